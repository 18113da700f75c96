"""Evaluations killed while answering and again while judging: the numbers of one left in peace.

python -m benchmarks.resume                        # real data in ../shared/real, the toy model

The judge is a local HTTP server that grades by the hash of its prompt: the same prompt always gets
the same grade, so any answer that came out differently would show. VideoInstruct's own videos are
not there: real clips stand in for them, under their names.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.evaluation.servers import grade, serving

from benchmarks.measuring import report

REAL = Path(__file__).resolve().parents[2] / "shared" / "real"


def stand_in_videos(questions: Path, clips: Path, folder: Path, *, names: int) -> Path:
    """Clips under the names of the first videos that each of the question files asks about."""
    folder.mkdir()
    found = sorted(path for path in clips.iterdir() if path.suffix == ".mp4")
    for file in sorted(questions.glob("*_qa.json")):
        for n, item in enumerate(json.loads(file.read_text())[:names]):
            clip = found[n % len(found)]
            shutil.copy(clip, folder / f"{item['video_name']}{clip.suffix}")
    return folder


def tasks(real: Path, scratch: Path) -> dict[str, list[object]]:
    """What to run: options by task."""
    video, limit = real / "video", 18
    bench = video / "videoinstruct_bench"
    videos = stand_in_videos(bench, video / "clips", scratch / "videos", names=limit)
    return {
        "msvd-qa": ["--data", video / "msvd_qa/clips_subset.json", "--media", video / "clips"],
        "videoinstruct": [
            *("--data", bench, "--media", videos),
            *("--limit", limit, "--max-new-tokens", 24, "--batch-size", 2),
        ],
        "infimm-eval": ["--data", real / "infimm_eval", "--max-new-tokens", 24, "--batch-size", 2],
    }


def start(task: str, options: list[object], out: Path) -> subprocess.Popen[str]:
    """The program on its own."""
    command = [sys.executable, "-m", "llama_adapter.cli", "eval", task, *map(str, options)]
    command += ["--out", str(out), "--json"]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8"
    )


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    """What it printed, once it is done."""
    stdout, stderr = process.communicate()
    if process.returncode:
        raise SystemExit(f"eval ended with {process.returncode}: {stderr[-2000:]}")
    result: dict[str, Any] = json.loads(stdout)
    result.pop("out")
    return result


def kill_at(process: subprocess.Popen[str], path: Path, *, lines: int) -> int:
    """Kill it as soon as a file has so many lines; how many it had then."""
    while process.poll() is None and count(path) < lines:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    return count(path)


def count(path: Path) -> int:
    """Whole lines of a file."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def answers(folder: Path) -> dict[str, Any]:
    """Answers by record."""
    lines = (folder / "predictions.jsonl").read_text().splitlines()
    return {line["id"]: line["answers"] for line in map(json.loads, lines)}


def compare(task: str, options: list[object], scratch: Path) -> dict[str, Any]:
    """One run in peace and one that is killed twice."""
    whole, killed = scratch / f"{task}-whole", scratch / f"{task}-killed"
    started = time.perf_counter()
    expected = finish(start(task, options, whole))
    seconds = time.perf_counter() - started
    places = {}
    for name in ("predictions.jsonl", "judgements.jsonl"):
        total = count(whole / name)
        had = kill_at(start(task, options, killed), killed / name, lines=max(1, total // 3))
        places[name] = f"{had} of {total}"
    found = finish(start(task, options, killed))
    return {
        "n": found["n"],
        "killed_at": places,
        "same_answers": answers(killed) == answers(whole),
        "same_result": found == expected,
        "metrics": {name: round(value, 3) for name, value in found["metrics"].items()},
        "judging": found["judging"],
        "seconds_uninterrupted": round(seconds, 1),
    }


def main() -> None:
    """Run, compare, print and store; end with 1 where anything differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--real", type=Path, default=REAL, help="folder of the real data")
    parser.add_argument("--model", default="toy", help="an adapter directory, or `toy`")
    parser.add_argument("--task", action="append", help="only this one; may be repeated")
    parser.add_argument("--out", type=Path, help="also write the JSON there")
    parser.set_defaults(device="cpu")
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name, serving(grade, seconds=0.1) as served:
        scratch = Path(name)
        judge = ["--judge-url", served.url, "--judge-model", "hash", "--judge-concurrency", 2]
        judge += ["--judge-price-in", 0.5, "--judge-price-out", 1.5, "--model", arguments.model]
        for task, options in tasks(arguments.real, scratch).items():
            if not arguments.task or task in arguments.task:
                results[task] = compare(task, [*options, *judge], scratch)
                results[task]["judging"]["judge"] = "hash"  # its address is another each time
    arguments.real = "../shared/real"
    report("resume", results, targets={}, options=arguments)
    if not all(result["same_result"] and result["same_answers"] for result in results.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
