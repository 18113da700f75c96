"""How fast training data is read, and how little memory it takes.

    python -m benchmarks.data
    python -m benchmarks.data --photos ../shared/real/captions/flickr8k

Reading: images decoded, resized and laid into packed rows with their captions, in samples a
second of wall time, for each number of worker processes. Without --photos, images of 500 x 375
random pixels are written and read. Memory: resident bytes while 100,000 synthetic Alpaca records
are opened, measured and streamed from one end of an epoch to the other; each side in a process of
its own. Growth is from the first to the last quarter of the epoch.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tools.miniature.tokenizer import build_tokenizer
from transformers import CLIPImageProcessorPil

from benchmarks.measuring import add_options, report
from llama_adapter import LlamaAdapterProcessor
from llama_adapter.data import SOURCES, BatchStream, Component, Kind, SampleEncoder, Source, measure

WORDS = ("the", "a", "red", "blue", "small", "large", "star", "circle", "is", "in", "where")
MOST_GROWTH = 0.10
"""Of resident memory between the quarters of an epoch: more is no longer flat."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser, rounds=3)
    parser.add_argument("--photos", type=Path, help="a folder with captions.json and its images")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=400, help="read in each timed turn")
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--side", help="one side alone, for a process of its own")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.side is not None:
        print(json.dumps(_memory(options)))
        return
    results = {f"workers_{n}": _reading(options, workers=n) for n in options.workers}
    results["memory"] = _memory_in_a_process(options)
    report("data", results, targets={}, options=options)


def _processor() -> LlamaAdapterProcessor:
    images = CLIPImageProcessorPil(
        size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224}
    )
    return LlamaAdapterProcessor(images, build_tokenizer(), template="alpaca")


def _stream(source: Source, kind: Kind, *, workers: int, rows: int, length: int) -> BatchStream:
    encoder = SampleEncoder(_processor(), row_length=length, too_long="truncate")
    component = Component(source=source, pieces=measure(source, encoder))
    return BatchStream(
        kind, [component], encoder, rows=rows, row_length=length, seed=0, workers=workers
    )


# --- reading images -----------------------------------------------------------------------


def _reading(options: argparse.Namespace, *, workers: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        photos = options.photos or _write_photos(Path(folder), count=100)
        described = SOURCES["coco_captions"].model_validate(
            {"path": photos / "captions.json", "images": photos}
        )
        stream = _stream(described.open("caption"), "caption", workers=workers, rows=2, length=1024)
        next(stream)  # starts the workers
        rates, spent = [], []
        for _ in range(options.rounds):
            began, busy, count = time.perf_counter(), time.process_time(), 0
            while count < options.samples:
                count += len(next(stream).sample_ids)
            rates.append(count / (time.perf_counter() - began))
            spent.append((time.process_time() - busy) / count)
        fill = stream.fill()
        stream.close()
    return {
        "samples_per_second": round(float(np.median(rates)), 1),
        "all_turns": [round(rate, 1) for rate in rates],
        # what other processes of a busy machine took does not count here
        "cpu_milliseconds_per_sample_in_the_main_process": round(1e3 * float(np.median(spent)), 2),
        "share_of_row_filled": round(fill, 4),
    }


def _write_photos(folder: Path, *, count: int) -> Path:
    rng = np.random.default_rng(0)
    records = []
    for number in range(count):
        coarse = rng.integers(0, 255, (47, 63, 3), dtype=np.uint8)
        name = f"{number}.jpg"
        Image.fromarray(coarse).resize((500, 375)).save(folder / name, quality=90)
        records.append({"image": name, "captions": [_text(rng, 10) for _ in range(5)]})
    (folder / "captions.json").write_text(json.dumps(records))
    return folder


# --- memory ---------------------------------------------------------------------------------


def _memory_in_a_process(options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.data", "--side", "memory"]
    command += ["--records", str(options.records), "--threads", str(options.threads)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _memory(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "records.json"
        _write_records(path, options.records)
        before = _resident()
        source = SOURCES["alpaca"].model_validate({"path": path}).open("instruction")
        opened = _resident()
        stream = _stream(source, "instruction", workers=0, rows=8, length=2048)
        measured = _resident()
        count, sizes = 0, []
        while count < options.records:
            count += len(next(stream).sample_ids)
            sizes.append(_resident())
        quarter = max(1, len(sizes) // 4)
        first, last = (float(np.mean(part)) for part in (sizes[:quarter], sizes[-quarter:]))
        return {
            "records": options.records,
            "file_mebibytes": _mebi(path.stat().st_size),
            "resident_mebibytes": {
                "before": _mebi(before),
                "opened": _mebi(opened),
                "measured": _mebi(measured),
                "first_quarter": _mebi(first),
                "last_quarter": _mebi(last),
                "peak": _mebi(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss),
            },
            "growth": round(last / first - 1, 4),
            "flat": last / first - 1 <= MOST_GROWTH,
        }


def _write_records(path: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    texts = [_text(rng, int(n)) for n in rng.integers(10, 120, 500)]
    with path.open("w") as file:
        for number in range(count):
            record = {
                "instruction": f"{texts[number % 499][:80]} {number}?",
                "input": "",
                "output": texts[number % 500],
            }
            file.write(("[\n" if number == 0 else ",\n") + json.dumps(record))
        file.write("\n]\n")


def _text(rng: np.random.Generator, words: int) -> str:
    return " ".join(rng.choice(WORDS, words))


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def _mebi(count: float) -> float:
    return round(count / 2**20, 1)


if __name__ == "__main__":
    main()
