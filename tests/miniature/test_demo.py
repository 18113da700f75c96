"""The demonstration end to end, at the smallest size that still does everything."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from llama_adapter.errors import ConfigError
from llama_adapter.miniature.ablation import AblationSettings, run_ablation, write_results
from llama_adapter.miniature.demo import DemoSettings, run_demo, save_demo
from llama_adapter.miniature.measure import CLAIMS
from llama_adapter.miniature.sheet import Shown, lines_of


def quiet(label, total):
    return lambda count: None


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    settings = DemoSettings(minutes=0.1, seed=1, pictures=48, test_pictures=12, questions=22)
    result = run_demo(settings, stage=quiet)
    save_demo(result, out)
    return out


def test_results_name_every_claim_with_its_interval(saved):
    results = json.loads((saved / "results.json").read_text())
    assert {"shipped", "trained", "seconds", "trainable", "seed", "versions"} <= set(results)
    for side in ("shipped", "trained"):
        for claim in CLAIMS:
            entry = results[side][claim]
            assert 0 <= entry["low"] <= entry["value"] <= entry["high"] <= 1
            assert entry["n"] > 0
    assert set(results["trainable"]) == {"vision", "language"}
    assert results["trainable"]["vision"] > 0


def test_the_report_is_one_page_with_pictures_and_curves(saved):
    page = (saved / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 9
    assert "http" not in page.replace("http-equiv", "")
    for claim in CLAIMS:
        assert f"<td>{claim}</td>" in page
    with Image.open(saved / "pictures.png") as sheet:
        assert sheet.width > sheet.height


def test_the_sheet_says_what_is_wrong():
    shown = Shown(
        image=Image.new("RGB", (4, 4)),
        caption=("a star.", "a circle."),
        answers=(("where?", "here.", "here."), ("what?", "this.", "that.")),
    )
    wrong = [text for text, is_right in lines_of(shown) if not is_right]
    assert wrong == ["“a star.”", "→ this."]
    assert len(lines_of(shown)) == 5


def test_the_fresh_adapter_loads_and_answers(saved):
    from llama_adapter import LlamaAdapterForConditionalGeneration, LlamaAdapterProcessor
    from llama_adapter.chat import ChatSession
    from llama_adapter.generation import GenerationSettings

    model = LlamaAdapterForConditionalGeneration.from_pretrained(saved / "adapter")
    processor = LlamaAdapterProcessor.from_pretrained(saved / "adapter")
    session = ChatSession(model, processor, settings=GenerationSettings(max_new_tokens=3))
    assert session.ask("what do you see?").tokens <= 3


def test_a_bad_duration_is_refused():
    with pytest.raises(ConfigError, match="minutes must be more than 0"):
        DemoSettings(minutes=0)


def test_an_ablation_goes_on_where_it_stopped(tmp_path):
    settings = AblationSettings(
        steps=2,
        seeds=(0,),
        pictures=24,
        test_pictures=8,
        questions=11,
        only=("reference", "late fusion, naive joint"),
    )
    first = run_ablation(settings, tmp_path, stage=quiet)
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").iterdir()}
    assert len(stamps) == 2
    assert run_ablation(settings, tmp_path, stage=quiet) == first
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").iterdir()} == stamps
    write_results(first, settings, tmp_path)
    assert "| late fusion, naive joint |" in (tmp_path / "ablation-results.md").read_text()
    assert (tmp_path / "ablation.png").stat().st_size > 1000
    with pytest.raises(ConfigError, match="unknown variant"):
        AblationSettings(only=("referense",)).chosen()
