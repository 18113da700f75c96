"""Running tasks: with a real tiny model and real servers, killed and taken up again."""

from __future__ import annotations

import contextlib
import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llama_adapter.errors import EvaluationError
from llama_adapter.evaluation.answering import EndpointAnswerer, LocalAnswerer
from llama_adapter.evaluation.manifest import MANIFEST, read_manifest
from llama_adapter.evaluation.media import IMAGE_SUFFIXES, MediaFolders
from llama_adapter.evaluation.predictions import JUDGMENTS, read_judgments, read_ours
from llama_adapter.evaluation.running import Selection, merge_shards, run
from llama_adapter.evaluation.tasks import find_task
from llama_adapter.evaluation.tasks.base import Generation, Inputs

from .servers import grade, serving

pytest.importorskip("openai")
VQA = find_task("vqa")
QUESTION = "what is it?"
SHORT = Generation(max_new_tokens=4, batch_size=4)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Ten questions about three images, one of them missing."""
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(2):
        Image.new("RGB", (16, 16), (100 * i, 50, 0)).save(folder / f"{i}.png")
    lines = [
        {
            "id": f"q{i}",
            "image": f"{i % 3}.png",
            "question": "what is it?" * (i % 4 + 1),
            "answer": "x",
        }
        for i in range(10)
    ]
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def local(adapter_dir: Path) -> LocalAnswerer:
    from llama_adapter.cli.models import load

    model, processor = load(str(adapter_dir), device="cpu")
    return LocalAnswerer(model, processor, directory=adapter_dir)


def lines_of(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(x) for x in (folder / "predictions.jsonl").read_text().splitlines()]
    return sorted(lines, key=lambda line: line["id"])


def answers_of(folder: Path) -> dict[str, Any]:
    return {line["id"]: line["answers"] for line in lines_of(folder)}


def test_a_run_answers_what_it_can_and_names_the_rest(
    data: Path, tmp_path: Path, local: LocalAnswerer
) -> None:
    report = run(VQA, local, Inputs(data=data), tmp_path / "out", generation=SHORT)
    assert report.records == 10
    assert sorted(report.problems) == [f"q{i}: missing 2.png" for i in (2, 5, 8)]
    lines = lines_of(tmp_path / "out")
    assert len(lines) == 10
    assert all(line["task"] == "vqa" and line["gold"] == "x" for line in lines)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert len(manifest["model"]["sha256"]["adapter_model.safetensors"]) == 64
    assert manifest["model"]["frame_rule"] in {"mean", "concat", "late-mean"}
    assert manifest["frames"]["rule"] == manifest["model"]["frame_rule"]
    assert manifest["example_prompt"] == "what is it?"
    assert manifest["generation"]["max_new_tokens"] == 4


def test_taken_up_again_it_gives_the_same_and_asks_only_what_is_left(
    data: Path, tmp_path: Path, local: LocalAnswerer
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(VQA, local, Inputs(data=data), whole, generation=SHORT)
    run(VQA, local, Inputs(data=data), parts, generation=SHORT)
    path = parts / "predictions.jsonl"
    kept = path.read_text().splitlines()[:3]
    path.write_text("\n".join(kept) + "\n" + kept[0][:25])
    report = run(VQA, local, Inputs(data=data), parts, generation=SHORT)
    assert report.answered_before == sum(not json.loads(line).get("problem") for line in kept)
    assert answers_of(parts) == answers_of(whole)


def test_another_run_in_the_folder_is_refused(
    data: Path, tmp_path: Path, local: LocalAnswerer
) -> None:
    out = tmp_path / "out"
    run(VQA, local, Inputs(data=data), out, generation=SHORT, selection=Selection(limit=2))
    with pytest.raises(EvaluationError, match=r"another run; records was 2, now 1\. Choose"):
        run(VQA, local, Inputs(data=data), out, generation=SHORT, selection=Selection(limit=1))
    with pytest.raises(EvaluationError, match=r"another run; generation was .*Choose"):
        run(VQA, local, Inputs(data=data), out, selection=Selection(limit=2))


def test_shards_merge_into_the_whole(data: Path, tmp_path: Path, local: LocalAnswerer) -> None:
    inputs = Inputs(data=data)
    for i in (1, 2):
        selection = Selection(shard=(i, 2))
        run(VQA, local, inputs, tmp_path / "out", generation=SHORT, selection=selection)
        if i == 1:
            with pytest.raises(EvaluationError, match="expected shard-1-of-2, shard-2-of-2"):
                merge_shards(VQA, tmp_path / "out")
    merge_shards(VQA, tmp_path / "out")
    run(VQA, local, inputs, tmp_path / "whole", generation=SHORT)
    assert answers_of(tmp_path / "out") == answers_of(tmp_path / "whole")
    merged, whole = (read_manifest(tmp_path / name) for name in ("out", "whole"))
    for key in ("task", "model", "generation", "records", "shard"):
        assert merged[key] == whole[key], key


def test_a_shard_whose_judge_was_killed_is_merged_and_later_verdicts_stay(
    data: Path, tmp_path: Path, local: LocalAnswerer
) -> None:
    for i in (1, 2):
        selection = Selection(shard=(i, 2))
        run(VQA, local, Inputs(data=data), tmp_path, generation=SHORT, selection=selection)
    judged = {"task": "vqa", "judge": "first", "aspect": "answer", "reply": "\u2028", "verdict": {}}
    line = json.dumps({"id": "1", **judged}, ensure_ascii=False) + "\n"
    (tmp_path / "shard-1-of-2" / JUDGMENTS).write_text(line + line[:20])
    (tmp_path / "shard-2-of-2" / JUDGMENTS).write_text(line.replace('"1"', '"2"'))
    merge_shards(VQA, tmp_path)
    assert [one["id"] for one in read_judgments(tmp_path / JUDGMENTS)] == ["1", "2"]
    with (tmp_path / JUDGMENTS).open("a") as file:
        file.write(line.replace("first", "later") + line)
    merge_shards(VQA, tmp_path)
    found = read_judgments(tmp_path / JUDGMENTS)
    assert [one["judge"] for one in found] == ["first", "first", "later", "first"]


def test_shards_of_other_settings_are_not_merged(
    data: Path, tmp_path: Path, local: LocalAnswerer
) -> None:
    for i, images in ((1, "none"), (2, "own")):
        other = Generation(max_new_tokens=4, batch_size=4, images=images)
        selection = Selection(shard=(i, 2))
        run(VQA, local, Inputs(data=data), tmp_path, generation=other, selection=selection)
    with pytest.raises(
        EvaluationError, match="is of another run than shard-1-of-2; its generation"
    ):
        merge_shards(VQA, tmp_path)


def test_stored_answers_are_not_taken_for_those_of_a_model(
    data: Path, tmp_path: Path, local: LocalAnswerer
) -> None:
    run(VQA, local, Inputs(data=data), tmp_path / "out", generation=SHORT)
    (tmp_path / "out" / MANIFEST).unlink()
    with pytest.raises(EvaluationError, match=r"holds answers without a manifest\.json"):
        run(VQA, local, Inputs(data=data), tmp_path / "out", generation=SHORT)


def test_all_images_missing_is_an_error_that_says_where_it_looked(
    data: Path, tmp_path: Path, local: LocalAnswerer
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(EvaluationError, match=r"none of the images .* below .*empty.*'0.png'"):
        run(VQA, local, Inputs(data=data), tmp_path / "out", media=empty)


def test_a_prompt_too_long_spoils_no_other(
    tmp_path: Path, data: Path, local: LocalAnswerer
) -> None:
    lines = [json.loads(line) for line in data.read_text().splitlines()][:2]
    (data.parent / "1.png").write_bytes(b"no image")
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = run(VQA, local, Inputs(data=data), tmp_path / "out", generation=SHORT)
    assert len(report.problems) == 1
    assert "1.png" in report.problems[0]
    assert answers_of(tmp_path / "out")["q0"]


def test_an_endpoint_is_sent_images_and_its_failures_are_noted(data: Path, tmp_path: Path) -> None:
    def behave(prompt: str, _: int) -> Any:
        return (400, {}, '{"error": {"message": "too long"}}') if len(prompt) > 40 else "a dog"

    with serving(behave) as served:
        answerer = EndpointAnswerer(url=served.url, model="m", retries=0)
        report = run(VQA, answerer, Inputs(data=data), tmp_path / "out", generation=SHORT)
        answerer.close()
    content = served.bodies[0]["messages"][0]["content"]
    assert content[0]["image_url"]["url"].startswith("data:image/jpeg;base64,")
    assert any("too long" in problem for problem in report.problems)
    assert {tuple(a) for a in answers_of(tmp_path / "out").values()} == {("a dog",), ()}


def test_several_questions_of_one_record_and_several_images(
    tmp_path: Path, local: LocalAnswerer, real: Path
) -> None:
    inputs = Inputs(data=real / "infimm_eval")
    report = run(find_task("infimm-eval"), local, inputs, tmp_path / "out", generation=SHORT)
    assert (report.records, report.problems) == (14, ())


def test_files_are_found_by_the_names_that_benchmarks_give(tmp_path: Path) -> None:
    for name in ("OCR/0001.jpg", "color/images/0001.jpg", "val/COCO_val2014_000000000005.jpg"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "clip.avi").touch()
    folders = MediaFolders([tmp_path])

    def find(name: str) -> str | None:
        suffixes = IMAGE_SUFFIXES | {".avi"}
        path = folders.find(name, suffixes=suffixes)
        return None if path is None else str(path.relative_to(tmp_path.resolve()))

    assert find("OCR/0001.jpg") == "OCR/0001.jpg"
    assert find("color/0001.jpg") == "color/images/0001.jpg"
    assert find("COCO_val2014_000000000005.jpg") == "val/COCO_val2014_000000000005.jpg"
    assert find("clip") == "clip.avi"
    assert find("../data.jpg") is None
    (tmp_path / "youtube_mapping.txt").write_text("clip vid7\n")
    assert MediaFolders([tmp_path]).find("vid7", suffixes={".avi"}) is not None


# The program as a whole: real data, a judge over HTTP, a kill in the middle.


def evaluate(arguments: Sequence[object]) -> dict[str, Any]:
    from llama_adapter.cli.app import app

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        app([*map(str, ["eval", *arguments]), "--json"], standalone_mode=False)
    result: dict[str, Any] = json.loads(out.getvalue())
    return result


def kill_in_the_middle(arguments: Sequence[object], out: Path) -> None:
    """Start the program on its own and kill it when a few answers are there."""
    command = [sys.executable, "-m", "llama_adapter.cli", "eval", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    predictions = out / "predictions.jsonl"
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if predictions.exists() and predictions.read_text().count("\n") >= 2:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()


CASES: dict[str, Callable[[Path], list[object]]] = {
    "msvd-qa": lambda real: [
        "--data", real / "video/msvd_qa/clips_subset.json", "--media", real / "video/clips",
        "--frames", 2, "--max-new-tokens", 3, "--batch-size", 2,
    ],
    "infimm-eval": lambda real: [
        # long answers: its few records must last until it is killed
        "--data", real / "infimm_eval", "--max-new-tokens", 100, "--batch-size", 1,
    ],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("task", CASES)
def test_killed_and_resumed_gives_the_same_numbers(
    task: str, real: Path, tmp_path: Path, adapter_dir: Path
) -> None:
    with serving(grade) as served:
        common = [task, "--model", adapter_dir, *CASES[task](real)]
        common += ["--judge-url", served.url, "--judge-model", "hash"]
        kill_in_the_middle([*common, "--out", tmp_path / "killed"], tmp_path / "killed")
        before = len((tmp_path / "killed" / "predictions.jsonl").read_text().splitlines())
        resumed = evaluate([*common, "--out", tmp_path / "killed"])
        whole = evaluate([*common, "--out", tmp_path / "whole"])
    assert 0 < before < whole["n"]
    for result in (resumed, whole):
        result.pop("out")
    assert resumed == whole
    assert answers_of(tmp_path / "killed") == answers_of(tmp_path / "whole")


def test_videoinstruct_with_its_pairs_of_questions(
    real: Path, tmp_path: Path, adapter_dir: Path, write: Any
) -> None:
    clip = real / "video" / "clips" / "llamafactory_4.mp4"
    asked = {"A": "a girl draws", "video_name": clip.stem}
    for part in ("generic", "temporal"):
        write(f"bench/{part}_qa.json", [{"Q": "what happens?", **asked}] * 2)
    write("bench/consistency_qa.json", [{"Q1": "what?", "Q2": "who?", **asked}])
    options = ["--frames", 2, "--max-new-tokens", 2, "--media", clip.parent]
    with serving(grade) as served:
        judge = ["--judge-url", served.url, "--judge-model", "hash"]
        common = ["--model", adapter_dir, "--data", tmp_path / "bench", "--out", tmp_path / "out"]
        found = evaluate(["videoinstruct", *common, *options, *judge])
    # three aspects of each generic answer, one of the others; equal prompts are asked apart
    assert sum(served.asked.values()) == 2 * 3 + 2 + 1
    assert (found["n"], found["unjudged"]) == (5, 0)
    assert {"correctness", "detail", "context", "temporal", "consistency", "mean"} <= set(
        found["metrics"]
    )
    assert len(lines_of(tmp_path / "out")[0]["answers"]) == 2


def test_an_answer_about_a_damaged_video_says_so(
    tmp_path: Path, local: LocalAnswerer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llama_adapter.processing.video import Video

    frames = tuple(Image.new("RGB", (16, 16), (i, 0, 0)) for i in range(8))
    found = Video(frames=frames, times=(0.0,) * 8, seconds=1.0, name="a.mp4", repeated=3)
    monkeypatch.setattr("llama_adapter.evaluation.running.load_video", lambda *_, **__: found)
    (tmp_path / "a.mp4").write_bytes(b"half")
    asked = {"video_name": "a", "question": "what?", "answer": "x", "question_id": "1"}
    (tmp_path / "questions.json").write_text(json.dumps([asked]))
    run(find_task("msvd-qa"), local, Inputs(data=tmp_path / "questions.json"), tmp_path / "out")
    [line] = lines_of(tmp_path / "out")
    assert line["notes"] == ["a.mp4: 3 of 8 frames cannot be decoded; others replace them"]
    read = read_ours(tmp_path / "out" / "predictions.jsonl", task="msvd-qa")
    assert read.notes == ("1 answers rest on videos of which a part cannot be decoded",)
