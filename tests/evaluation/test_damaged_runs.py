"""Folders of runs with damaged, missing or hostile parts: one line, and nothing of theirs lost."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llama_adapter.errors import EvaluationError
from llama_adapter.evaluation.jsonfiles import lines_to_append
from llama_adapter.evaluation.judging import read_judge_prompts
from llama_adapter.evaluation.manifest import make_manifest, start_or_resume
from llama_adapter.evaluation.media import IMAGE_SUFFIXES, MediaFolders
from llama_adapter.evaluation.records import Record
from llama_adapter.evaluation.report import as_csv, as_markdown, find_runs, table
from llama_adapter.evaluation.report_page import write_report
from llama_adapter.evaluation.running import merge_shards
from llama_adapter.evaluation.tasks import find_task
from llama_adapter.evaluation.tasks.base import Generation

from .conftest import ours, quick

MANIFESTS = [
    "", "{", "[]", '"x"', '{"model": 5}', '{"records": "2"}', '{"data": ["x"]}',
    '{"model": {"directory": 7}}', '{"frames": "mean"}', '{"task": "vqa", "task": "mme"}',
]  # fmt: skip


@pytest.mark.parametrize("content", MANIFESTS)
def test_damaged_manifests(write: Any, content: str) -> None:
    path = write("run/manifest.json", content)
    write("run/predictions.jsonl", ours("vqa", [("1", "a")]))
    now = make_manifest(
        task="vqa", model={}, data=path, records=[Record(id="1", questions=("?",))],
        generation=Generation(), shard=None, example="",
    )  # fmt: skip
    with pytest.raises(EvaluationError, match=r"manifest\.json"):
        start_or_resume(path.parent, now)
    with pytest.raises(EvaluationError, match=r"manifest\.json"):
        find_runs([path.parent], resamples=0)
    assert path.read_text() == content


SCORE = {
    "task": "miniature", "n": 2, "unanswered": 0, "unparsed": 0, "unjudged": 0,
    "metrics": {"caption": 50.0}, "intervals": {"caption": [10.0, 90.0]}, "notes": [],
    "protocol": {},
}  # fmt: skip
DAMAGES: list[dict[str, Any]] = [
    {"task": 5}, {"n": "2"}, {"n": True}, {"metrics": []}, {"metrics": {"caption": "50"}},
    {"intervals": {"caption": [10.0]}}, {"intervals": {"caption": [10.0, None]}}, {"notes": [1]},
    {"protocol": "x"}, {"counts": {"caption": "2"}}, {"counts": 2},
]  # fmt: skip


@pytest.mark.parametrize("change", DAMAGES)
def test_damaged_scores_of_runs_without_answers(write: Any, change: dict[str, Any]) -> None:
    manifest = {"task": "miniature", "model": {"directory": "/models/mine"}}
    write("runs/run/manifest.json", manifest)
    path = write("runs/run/score.json", SCORE)
    write("runs/other/score.json", [])  # another program's
    for counts, shown in (({}, ""), ({"counts": {"caption": 5}}, "5")):
        write("runs/run/score.json", SCORE | counts)
        row = f"| run (mine) | {shown} | 50.00 [10.00, 90.00] |  |"
        assert row in as_markdown(table(find_runs([path.parents[1]])))
    write("runs/run/score.json", SCORE | change)
    name = next(iter(change))
    with pytest.raises(EvaluationError, match=rf"score\.json: {name} is not as a run writes it"):
        find_runs([path.parents[1]])


@pytest.mark.parametrize(
    "manifest",
    ["{", [], {"name": "An app", "icons": []}, {"task": ["miniature"]}, {"task": "vqa"}],
)
def test_a_score_is_reported_only_for_a_task_that_stores_no_answers(
    write: Any, tmp_path: Path, manifest: Any
) -> None:
    write("runs/other/manifest.json", manifest)
    write("runs/other/score.json", SCORE | {"task": "vqa"})  # a run's whose answers are gone, say
    with pytest.raises(EvaluationError, match="holds no run"):
        find_runs([tmp_path / "runs"])
    write("runs/run/manifest.json", {"task": "miniature"})
    write("runs/run/score.json", SCORE)
    assert [run.folder.name for run in find_runs([tmp_path / "runs"])] == ["run"]


JUDGMENTS: list[Any] = [{"id": 1}, {"aspect": 5}, {"verdict": "yes"}, {"reply": ["x"]}]


@pytest.mark.parametrize("change", JUDGMENTS)
def test_damaged_judgements(write: Any, change: dict[str, Any]) -> None:
    path = write("predictions.jsonl", ours("vqa", [("1", "a")]))
    line = {"task": "vqa", "id": "1", "aspect": "answer", "judge": "m", "reply": "Yes, score: 4"}
    write("judgements.jsonl", [{**line, **change}])
    if change == {"id": 1}:
        assert quick("vqa", path).metrics["score"] == 4
        return
    with pytest.raises(EvaluationError, match=rf"line 1: {next(iter(change))} is not as a run"):
        quick("vqa", path)


def test_a_cut_line_is_taken_off_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    path.write_text('{"a": 1}\n{"b')
    lines_to_append(path)
    lines_to_append(path)
    assert path.read_text() == '{"a": 1}\n'


def test_shards_with_odd_names_and_no_manifest(write: Any, tmp_path: Path) -> None:
    write("shard-x-of-y/predictions.jsonl", ours("vqa", [("1", "a")]))
    with pytest.raises(EvaluationError, match="holds no shards"):
        merge_shards(find_task("vqa"), tmp_path)
    write("shard-1-of-1/predictions.jsonl", ours("vqa", [("1", "a")]))
    with pytest.raises(EvaluationError, match="is not done, 1 of None records"):
        merge_shards(find_task("vqa"), tmp_path)
    write("shard-1-of-1/manifest.json", {"records": 1})
    assert json.loads(merge_shards(find_task("vqa"), tmp_path).read_text())["id"] == "1"


def test_a_run_without_a_number_stands_in_the_report(write: Any, tmp_path: Path) -> None:
    write("runs/a/predictions.jsonl", ours("videoinstruct", [("1", "a")], part="generic"))
    write("runs/b/predictions.jsonl", ours("vicuna-80", [("1", "a")]))
    runs = find_runs([tmp_path / "runs"], resamples=20)
    lines = table(runs)
    own = [line for line in lines if not line.is_published]
    assert [(line.value, line.missing) for line in own] == [(None, "1 unjudged")] * 2
    assert "| a (unknown model) | 1 |  |" in as_markdown(lines)
    assert ",0" not in as_csv(own)
    page = write_report(runs, tmp_path / "report")[2].read_text()
    assert "no answer is judged" in page


def test_a_report_shows_what_it_finds_and_names_what_it_does_not(
    write: Any, tmp_path: Path
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    names = [
        "in.png",
        str(tmp_path / "secret.png"),
        "../secret.png",
        "x" * 5000,
        "\x00",
        "pipe.png",
        "link.png",
    ]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "secret.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "data" / "in.png")
    os.mkfifo(tmp_path / "data" / "pipe.png")
    lines = [{**ours("vqa", [(str(n), "a")])[0], "images": [x]} for n, x in enumerate(names)]
    write("runs/a/predictions.jsonl", lines[:4])
    write("runs/b/predictions.jsonl", lines[4:])
    for run in "ab":
        manifest = {"data": str(tmp_path / "data" / "in.png"), "model": None}
        write(f"runs/{run}/manifest.json", manifest)
    folders = MediaFolders([tmp_path / "data"])
    found = [folders.find(name, suffixes=IMAGE_SUFFIXES) is not None for name in names]
    assert found == [True, *[False] * 6]
    assert write_report(find_runs([tmp_path / "runs"], resamples=0), tmp_path / "report")


@pytest.mark.parametrize("content", [[], "x", {"answer": 5}, {"answer": ["x"]}, {"other": "x"}])
def test_judge_prompts_of_other_shapes(write: Any, content: Any) -> None:
    with pytest.raises(EvaluationError, match=r"prompts\.json"):
        read_judge_prompts(find_task("vqa"), write("prompts.json", content))
