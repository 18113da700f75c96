"""A run of a recipe: what it writes, and going on as if nothing had happened."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from tests.disk import disk_of
from transformers import AutoModelForCausalLM

from llama_adapter import LlamaAdapterForConditionalGeneration, LlamaAdapterProcessor
from llama_adapter.errors import CheckpointError, ConfigError, TrainingError
from llama_adapter.model.persistence import ADAPTER_WEIGHTS_NAME
from llama_adapter.model.tensor_files import read_tensors
from llama_adapter.training.callbacks import Callbacks
from llama_adapter.training.launch import train
from llama_adapter.training.memory import sizes_of
from llama_adapter.training.plot import plot_run
from llama_adapter.training.recipe import load_recipe
from llama_adapter.training.run import TrainingResult

Recipe = Callable[..., Path]


def run(path: Path, *overrides: str, **options: Any) -> TrainingResult:
    return train(load_recipe(path, overrides), **options)


class Stop(Exception):
    pass


def stop_at(step: int) -> Callbacks:
    def watch(row: dict[str, Any]) -> None:
        if row["step"] == step:
            raise Stop

    return Callbacks(step=watch)


def test_a_run_leaves_an_adapter_metrics_and_checkpoints(
    recipe_file: Recipe, losses: Any, tmp_path: Path
) -> None:
    result = run(recipe_file())
    rows = losses(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(row["loss/caption"] > 0 and row["loss/instruction"] > 0 for row in rows)
    assert {"grad_norm/vision", "grad_norm/language", "lr/gates", "tokens"} <= rows[0].keys()
    gates = [name for name in rows[1] if name.startswith("gate/")]
    assert len(gates) == 3
    assert rows[-1]["lr/vision"] < rows[1]["lr/vision"]
    kept = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert kept == ["step-00000004", "step-00000006"]
    model = LlamaAdapterForConditionalGeneration.from_pretrained(result.adapter)
    LlamaAdapterProcessor.from_pretrained(result.adapter)
    assert 'from_pretrained("adapter")' in (result.adapter / "README.md").read_text()
    assert result.trained == {
        "adapter": sum(p.numel() for _, p in model.adapter.named_parameters())
    }


def test_what_no_data_moves_is_not_counted_as_trained(recipe_file: Recipe, tmp_path: Path) -> None:
    path = recipe_file(instructions=None)
    begun = run(path, "steps=1", f"out={tmp_path}/begun")
    result = run(path)
    before, after = (
        LlamaAdapterForConditionalGeneration.from_pretrained(each.adapter)
        for each in (begun, result)
    )
    assert result.trained == {"adapter": sum(p.numel() for p in after.group_parameters("vision"))}
    sizes, of_both = sizes_of(load_recipe(path)), sizes_of(load_recipe(recipe_file()))
    assert sizes.trained_parameters == {"vision": result.trained["adapter"]}
    idle = sum(of_both.trained_parameters.values()) - result.trained["adapter"]
    assert sizes.frozen_bytes - of_both.frozen_bytes == 4 * idle
    pairs = zip(
        before.group_parameters("language"), after.group_parameters("language"), strict=True
    )
    assert all(torch.equal(one, other) for one, other in pairs)


def test_stopped_and_resumed_equals_uninterrupted(
    recipe_file: Recipe, losses: Any, tmp_path: Path
) -> None:
    """To the bit, wherever it stops; dropout, data and optimizer included."""
    path = recipe_file()
    whole = run(path, f"out={tmp_path}/whole")

    out = f"out={tmp_path}/parts"
    with pytest.raises(Stop):
        run(path, out, callbacks=stop_at(1))
    for step in (3, 5):
        with pytest.raises(Stop):
            run(path, out, resume=True, callbacks=stop_at(step))
    parts = run(path, out, resume=True)
    assert parts.started_at == 4
    assert parts.checksum == whole.checksum
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_another_recipe_is_refused(recipe_file: Recipe, tmp_path: Path) -> None:
    path = recipe_file(steps=2)
    run(path)
    with pytest.raises(TrainingError, match="holds a run already; go on with --resume"):
        run(path)
    with pytest.raises(TrainingError, match=r"optimizer.vision_lr was 0.001 and is now 0.5"):
        run(path, "optimizer.vision_lr=0.5", resume=True)
    # what changes no number may change
    again = run(path, "checkpoint_every=1", "data.workers=1", resume=True)
    assert again.started_at == 2
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(TrainingError, match="exists and holds no run"):
        run(path, f"out={tmp_path}/other")


def test_two_runs_in_one_directory_are_refused(recipe_file: Recipe, tmp_path: Path) -> None:
    path = recipe_file(steps=4)
    whole = run(path, f"out={tmp_path}/whole")
    out = f"out={tmp_path}/run"
    message = rf"run is in use: process {os.getpid()} on .* trains there; .*choose another out="

    def intrude(row: dict[str, Any]) -> None:
        for resume in (False, True):
            with pytest.raises(TrainingError, match=message):
                run(path, out, resume=resume)
        if row["step"] == 3:
            raise Stop

    with pytest.raises(Stop):
        run(path, out, callbacks=Callbacks(step=intrude))
    # let go by the first run, although that failed
    assert run(path, out, resume=True).checksum == whole.checksum


def test_a_full_disk_leaves_the_checkpoint_before_it_whole(
    recipe_file: Recipe, tmp_path: Path
) -> None:
    path = recipe_file()
    whole = run(path, f"out={tmp_path}/whole")
    message = r"cannot write .*step-00000004.*00000002 is whole"
    with ExitStack() as disk:

        def fill_up(row: dict[str, Any]) -> None:
            if row["step"] == 3:
                disk.enter_context(disk_of(8192))

        with pytest.raises(CheckpointError, match=message):
            run(path, f"out={tmp_path}/run", callbacks=Callbacks(step=fill_up))
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000002"]
    assert run(path, f"out={tmp_path}/run", resume=True).checksum == whole.checksum


def test_held_out_scores_and_the_best_adapter(
    recipe_file: Recipe, losses: Any, tmp_path: Path
) -> None:
    """Scoring leaves nothing behind: the run learns as one that never scored."""
    held = recipe_file(
        captions__sources=[
            {**yaml.safe_load(recipe_file().read_text())["captions"]["sources"][0], "held_out": 6}
        ]
    )
    asked: list[tuple[list[str], list[list[str]]]] = []

    def score(captions: Any, references: Any) -> dict[str, float]:
        asked.append((captions, references))
        return {"cider": float(len(asked))}

    evaluation = "evaluation={every: 2, samples: 5, max_new_tokens: 4, best: pairs.cider}"
    scored = run(held, f"out={tmp_path}/scored", evaluation, score_captions=score)
    rows = losses(tmp_path / "scored")
    found = [row for row in rows if "held_out/pairs.cider" in row]
    assert [row["step"] for row in found] == [2, 4, 6]
    assert all(row["held_out/pairs.perplexity"] > 1 for row in found)
    captions, references = asked[0]
    assert len(captions) == len(references) == 5
    assert all("picture" in text for texts in references for text in texts)
    # the scores rise, so the last is the best
    best, last = (tmp_path / "scored" / name / ADAPTER_WEIGHTS_NAME for name in ("best", "adapter"))
    assert best.read_bytes() == last.read_bytes()
    assert run(held, f"out={tmp_path}/unscored").checksum == scored.checksum


def test_invalid_pictures_held_out_do_not_end_a_run(
    recipe_file: Recipe, workshop: Path, losses: Any, tmp_path: Path
) -> None:
    data = shutil.copytree(workshop / "data", tmp_path / "data")
    for number in range(0, 24, 2):
        (data / f"{number}.png").write_bytes(b"no picture")
    source = {"type": "pairs", "path": str(data / "captions.tsv"), "held_out": 12}
    asked: list[int] = []

    def score(captions: Any, references: Any) -> dict[str, float]:
        asked.append(len(captions))
        return {"cider": 0.0}

    evaluation = "evaluation={every: 2, samples: 12, max_new_tokens: 4}"
    path = recipe_file(captions__sources=[source], steps=2)
    run(path, "data.max_invalid=1.0", evaluation, score_captions=score)
    assert 0 < asked[0] < 12
    assert losses(tmp_path / "run")[-1]["held_out/pairs.perplexity"] > 1


def test_invalid_pictures_are_counted_once_over_a_resume(
    recipe_file: Recipe, workshop: Path, tmp_path: Path
) -> None:
    data = shutil.copytree(workshop / "data", tmp_path / "data")
    source = {"type": "pairs", "path": str(data / "captions.tsv")}
    # 24 captions of about 10 tokens: six steps are an epoch
    path = recipe_file(captions__sources=[source], data__max_invalid=0.5, steps=18)
    broken = (0, 7, 13)

    def spoil() -> None:
        for number in broken:
            (data / f"{number}.png").write_bytes(b"no picture")

    def spoil_then_stop(row: dict[str, Any]) -> None:
        spoil()
        if row["step"] == 9:
            raise Stop

    with pytest.raises(Stop):
        run(path, callbacks=Callbacks(step=spoil_then_stop))
    result = run(path, resume=True)
    listed = [json.loads(line) for line in (tmp_path / "run/broken.jsonl").read_text().splitlines()]
    where = [row["where"] for row in listed]
    assert sorted(where) == sorted(f"{data / 'captions.tsv'}:{n + 2}" for n in broken)
    assert result.invalid == len(broken)


def test_another_metric_of_the_best_begins_anew(recipe_file: Recipe, tmp_path: Path) -> None:
    """A value of the metric before it is nothing to compare with."""
    held = recipe_file(
        instructions__sources=[
            {
                **yaml.safe_load(recipe_file().read_text())["instructions"]["sources"][0],
                "held_out": 6,
            }
        ],
        captions__sources=[
            {**yaml.safe_load(recipe_file().read_text())["captions"]["sources"][0], "held_out": 6}
        ],
    )
    arguments = (held, f"out={tmp_path}/run", "evaluation.every=2", "evaluation.samples=2")

    def score(_captions: Any, _references: Any) -> dict[str, float]:
        return {"cider": 0.01}

    with pytest.raises(Stop):
        run(
            *arguments,
            "evaluation.best=pairs.perplexity",
            callbacks=stop_at(5),
            score_captions=score,
        )
    before = (tmp_path / "run/best" / ADAPTER_WEIGHTS_NAME).read_bytes()
    with (tmp_path / "run/metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 6, "samples": ["\xc3')  # a kill may tear a letter in two
    for kept in (tmp_path / "run/cache").iterdir():
        kept.write_bytes(b"torn")
    run(*arguments, "evaluation.best=pairs.cider", resume=True, score_captions=score)
    assert (tmp_path / "run/best" / ADAPTER_WEIGHTS_NAME).read_bytes() != before


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers by an old name
def test_lora_beside_the_adapter(recipe_file: Recipe, workshop: Path, tmp_path: Path) -> None:
    """It learns, is counted and stored apart as peft stores it, and survives a resume."""
    peft = pytest.importorskip("peft")
    path = recipe_file(lora__rank=2, lora__targets=["q_proj", "v_proj"], steps=4)
    whole = run(path, f"out={tmp_path}/whole")
    assert whole.trained["lora"] == 3 * 2 * (2 * 32 + 32 + 16)
    assert whole.trained["adapter"] == run(recipe_file(steps=1)).trained["adapter"]
    factors = read_tensors(whole.adapter / "lora" / "adapter_model.safetensors")
    assert all(tensor.abs().sum() > 0 for tensor in factors.values())
    base = AutoModelForCausalLM.from_pretrained(workshop / "base")
    loaded = peft.PeftModel.from_pretrained(base, whole.adapter / "lora")
    load = LlamaAdapterForConditionalGeneration.from_pretrained
    logits = load(whole.adapter)(tokens := torch.tensor([[3, 4, 5]])).logits
    given = load(whole.adapter, language_model=loaded)(tokens).logits
    torch.testing.assert_close(given, logits, rtol=0, atol=0)
    base = AutoModelForCausalLM.from_pretrained(workshop / "base")
    merged = peft.PeftModel.from_pretrained(base, whole.adapter / "lora").merge_and_unload()
    with pytest.raises(
        CheckpointError, match=r"with a peft adapter \(LORA\) on it, this base has "
    ):
        load(whole.adapter, language_model=merged)
    path = recipe_file(lora__rank=2, lora__targets=["q_proj", "v_proj"], steps=4)
    with pytest.raises(Stop):
        run(path, f"out={tmp_path}/parts", callbacks=stop_at(3))
    torn = tmp_path / "parts/checkpoints/step-00000002/adapter/lora/adapter_model.safetensors"
    content = torn.read_bytes()
    torn.write_bytes(content[:50])
    with pytest.raises(CheckpointError, match="lora"):
        run(path, f"out={tmp_path}/parts", resume=True)
    torn.write_bytes(content)
    parts = run(path, f"out={tmp_path}/parts", resume=True)
    assert parts.checksum == whole.checksum
    again = read_tensors(parts.adapter / "lora" / "adapter_model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in factors.items())


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers by an old name
def test_a_start_brings_its_lora(recipe_file: Recipe, tmp_path: Path) -> None:
    """Its other numbers were learnt beside these factors, and mean little without them."""
    pytest.importorskip("peft")
    targets = ["q_proj", "v_proj"]
    first = run(recipe_file(lora__rank=2, lora__targets=targets, steps=2), f"out={tmp_path}/first")
    factors = read_tensors(first.adapter / "lora" / "adapter_model.safetensors")
    still = {"vision_lr": 0, "language_lr": 0, "gate_lr": 0}
    path = recipe_file(adapter={"start": str(first.adapter)}, optimizer=still, steps=1)
    for number, lora in enumerate(("lora=null", f"lora={{rank: 2, targets: {targets}}}")):
        second = run(path, f"out={tmp_path}/{number}", lora)
        assert second.trained == first.trained
        assert second.checksum == first.checksum
        kept = read_tensors(second.adapter / "lora" / "adapter_model.safetensors")
        assert all(torch.equal(kept[name], tensor) for name, tensor in factors.items())
    # and it goes on learning
    third = run(path, f"out={tmp_path}/third", "optimizer.language_lr=0.01")
    moved = read_tensors(third.adapter / "lora" / "adapter_model.safetensors")
    assert all(not torch.equal(moved[name], tensor) for name, tensor in factors.items())

    other = f"out={tmp_path}/other"
    with pytest.raises(ConfigError, match=r"lora\.rank is 4, but adapter.start has LoRA of rank 2"):
        run(path, f"{other}1", f"lora={{rank: 4, targets: {targets}}}")
    with pytest.raises(CheckpointError, match=r"lora holds another LoRA than the recipe asks for"):
        run(path, f"{other}2", "lora={rank: 2, targets: [k_proj]}")
    (first.adapter / "lora" / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_config\.json is missing"):
        run(path, f"{other}3")


def test_the_terms_of_a_start_are_those_of_what_goes_on_from_it(
    recipe_file: Recipe, tmp_path: Path
) -> None:
    first = run(recipe_file(steps=1), f"out={tmp_path}/first")
    path = recipe_file(adapter={"start": str(first.adapter)}, steps=1)

    def card(number: int) -> str:
        return (run(path, f"out={tmp_path}/{number}").adapter / "README.md").read_text()

    assert "license" not in card(1)
    terms = 'license: "other"\nlicense_name: "research only"\n'
    (first.adapter / "README.md").write_text(f"---\n{terms}tags: [a]\n---\n\n# Mine\n\nText.\n")
    found = card(2)
    assert found.startswith(f"---\n{terms}library_name:")
    assert found.endswith(
        "\nMade from `Mine`: its terms, and those of its data, hold for this one too.\n"
    )
    (first.adapter / "README.md").write_bytes(b"\xff")
    assert "license" not in card(3)


def test_bfloat16_autocast_keeps_trainables_in_float32(recipe_file: Recipe) -> None:
    result = run(recipe_file(steps=2), "compute.autocast=bfloat16", "base.dtype=bfloat16")
    tensors = read_tensors(result.adapter / ADAPTER_WEIGHTS_NAME)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_a_tracker_a_plot_and_a_page_of_a_run(recipe_file: Recipe, tmp_path: Path) -> None:
    run(recipe_file(steps=4), "logging.tracker=tensorboard")
    assert list((tmp_path / "run").rglob("events.out.tfevents.*"))
    png, page = plot_run(tmp_path / "run")
    with Image.open(png) as picture:
        assert picture.size[0] > 800
    text = page.read_text()
    assert "data:image/png;base64," in text
    assert "loss/caption" in text
    assert not re.search("https?:", text)  # no ":" is in base64, where "http" turns up by chance
    with pytest.raises(TrainingError, match=r"no metrics\.jsonl"):
        plot_run(tmp_path)
