"""Reports over runs on disk."""

from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llama_adapter.errors import EvaluationError
from llama_adapter.evaluation.published import PUBLISHED
from llama_adapter.evaluation.report import as_markdown, find_runs, table
from llama_adapter.evaluation.report_page import write_report
from llama_adapter.evaluation.tasks import TASKS

from .conftest import ours


@pytest.fixture
def runs(tmp_path: Path, write: Any) -> Path:
    """A run of twelve judged answers with images, and one nobody judged."""
    lines = []
    for i in range(12):
        Image.new("RGB", (300, 200), (20 * i, 0, 0)).save(tmp_path / f"{i}.png")
        line = ours("vqa", [(str(i), f"<b>answer {i}</b>")])[0]
        line["images"] = [f"{i}.png"]
        if i < 11:
            line["verdicts"] = {"answer": {"pred": "yes" if i % 2 else "no", "score": i % 6}}
        lines.append(line)
    write("runs/a/predictions.jsonl", lines)
    manifest = {"model": {"directory": "/models/mine"}, "data": str(tmp_path)}
    write("runs/a/manifest.json", {**manifest, "frames": {"rule": "late-mean"}})
    write("runs/b/predictions.jsonl", ours("msvd-qa", [("1", "a"), ("2", "b")]))
    return tmp_path / "runs"


def test_ours_are_next_to_the_published(runs: Path) -> None:
    lines = table(find_runs([runs], resamples=20))
    systems = {line.system for line in lines if line.task == "msvd-qa"}
    assert "LLaMA-Adapter" in systems
    text = as_markdown(lines)
    assert "| LLaMA-Adapter (published) |  | 54.90 | 3.10 |" in text
    assert re.search(r"\| a \(mine\) \| 12 \| 45\.45 \[\d", text)
    assert "1 unjudged" in text


def test_runs_that_are_named_alike_have_a_row_each(runs: Path, write: Any) -> None:
    for count, folder in enumerate(("first/vqa", "second/vqa"), 1):
        lines = [ours("msvd-qa", [(str(i), "a")])[0] for i in range(count)]
        write(f"runs/{folder}/predictions.jsonl", lines)
        write(f"runs/{folder}/manifest.json", {"model": {"directory": f"/{folder}/adapter"}})
    text = as_markdown(table(find_runs([runs, runs / "first"], resamples=20)))
    for row in ("first/vqa (adapter) | 1", "second/vqa (adapter) | 2", "b (unknown model) | 2"):
        assert text.count(f"| {row} |") == 1


def test_files_hold_the_same_numbers_and_need_nothing_else(runs: Path, tmp_path: Path) -> None:
    found = find_runs([runs], resamples=20)
    paths = write_report(found, tmp_path / "report")
    assert [path.name for path in paths] == ["report.md", "report.csv", "report.html"]
    rows = list(csv.DictReader(paths[1].read_text().splitlines()))
    assert len(rows) == len(table(found))
    page = paths[2].read_text()
    assert not re.search("https?:", page)  # no ":" is in base64, where "http" turns up by chance
    assert page.count("data:image/jpeg") == 9
    assert "<b>answer 1</b>" not in page
    assert "&lt;b&gt;answer 11&lt;/b&gt;" in page
    assert "frame rule: late-mean" in page
    for heading in ("Best", "Worst", "Unjudged"):
        assert f"<h4>{heading}</h4>" in page
    HTMLParser().feed(page)


def test_published_metrics_are_named_as_ours() -> None:
    for row in PUBLISHED:
        assert row.task in TASKS
        assert row.source


def test_no_runs(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="holds no run"):
        find_runs([tmp_path])
    with pytest.raises(EvaluationError, match="no such folder"):
        find_runs([tmp_path / "gone"])


def test_the_program_prints_json(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from llama_adapter.cli.app import app

    app(["report", str(runs), "--resamples", "10", "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["lines"][0]["task"] == "msvd-qa"
