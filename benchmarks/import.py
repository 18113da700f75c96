# ruff: noqa: N999 (the command is named `import`; `python -m` runs it all the same)
"""Converting a base in Meta's layout, against a plain copy of its files.

    python -m benchmarks.import                       # 2 GB in two shards, float16
    python -m benchmarks.import --gigabytes 8 --shards 4 --where /mnt/fast

Every round runs in fresh processes, copy and conversion in turn, and ends when the bytes are on
disk (fsync); the median over rounds of the ratio counts, since a busy machine slows both. Targets:
at least half the speed of the copy; peak memory, mapped pages included, at most the largest shard
and 2 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from llama_adapter.checkpoints.meta_base import MetaBase

GB = 10**9
TARGETS = {"speed_against_copy": 0.5, "memory_over_largest_shard_gb": 2.0}
DIM, FFN, HEADS, VOCAB = 2048, 5632, 16, 32000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--where", type=Path, help="a folder on the disk to measure")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--one", choices=("copy", "convert"), help=argparse.SUPPRESS)
    parser.add_argument("paths", nargs="*", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(measure(options.one, *options.paths)))
        return
    with tempfile.TemporaryDirectory(dir=options.where) as root:
        result = run(Path(root), options)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"import-{result['date']}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def run(root: Path, options: argparse.Namespace) -> dict[str, Any]:
    base = root / "base"
    make_base(base, gigabytes=options.gigabytes, shards=options.shards)
    sizes = [path.stat().st_size for path in base.glob("*.pth")]
    rounds: dict[str, list[dict[str, float]]] = {"copy": [], "convert": []}
    for _ in range(options.rounds):
        for what, results in rounds.items():
            out = root / "out"
            out.mkdir()
            results.append(in_fresh_process(what, base, out))
            shutil.rmtree(out)
    median = {
        (what, key): statistics.median(r[key] for r in results)
        for what, results in rounds.items()
        for key in ("seconds", "cpu_seconds")
    }
    speeds = {what: sum(sizes) / GB / median[what, "seconds"] for what in rounds}
    ratios = [
        copied["seconds"] / converted["seconds"]
        for copied, converted in zip(rounds["copy"], rounds["convert"], strict=True)
    ]
    peak = max(r["peak_bytes"] for r in rounds["convert"]) / GB
    return {
        "benchmark": "import",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "device": f"{processor()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "base_gb": round(sum(sizes) / GB, 3),
        "shards": len(sizes),
        "largest_shard_gb": round(max(sizes) / GB, 3),
        "copy_gb_per_s": round(speeds["copy"], 3),
        "convert_gb_per_s": round(speeds["convert"], 3),
        "speed_against_copy": round(statistics.median(ratios), 3),
        "cpu_seconds": {what: round(median[what, "cpu_seconds"], 3) for what in rounds},
        "peak_memory_gb": round(peak, 3),
        "memory_over_largest_shard_gb": round(peak - max(sizes) / GB, 3),
        "targets": TARGETS,
        "rounds": rounds,
    }


def make_base(directory: Path, *, gigabytes: float, shards: int) -> None:
    """A synthetic LLaMA in float16, split as model-parallel training splits it."""
    directory.mkdir()
    per_layer = 2 * (4 * DIM * DIM + 3 * DIM * FFN)
    layers = max(1, round((gigabytes * GB - 4 * VOCAB * DIM) / per_layer))
    params = {"dim": DIM, "n_heads": HEADS, "n_layers": layers, "multiple_of": 256,
              "ffn_dim_multiplier": 1.03, "norm_eps": 1e-6, "vocab_size": -1}  # fmt: skip
    (directory / "params.json").write_text(json.dumps(params))

    def part(rows: int, columns: int) -> torch.Tensor:
        return torch.zeros(rows, columns, dtype=torch.float16).uniform_(-0.05, 0.05)

    for shard in range(shards):
        tensors = {
            "tok_embeddings.weight": part(VOCAB, DIM // shards),
            "norm.weight": torch.ones(DIM, dtype=torch.float16),
            "output.weight": part(VOCAB // shards, DIM),
        }
        for layer in range(layers):
            for name, shape in (
                ("attention.wq", (DIM // shards, DIM)),
                ("attention.wk", (DIM // shards, DIM)),
                ("attention.wv", (DIM // shards, DIM)),
                ("attention.wo", (DIM, DIM // shards)),
                ("feed_forward.w1", (FFN // shards, DIM)),
                ("feed_forward.w2", (DIM, FFN // shards)),
                ("feed_forward.w3", (FFN // shards, DIM)),
            ):
                tensors[f"layers.{layer}.{name}.weight"] = part(*shape)
            for name in ("attention_norm", "ffn_norm"):
                tensors[f"layers.{layer}.{name}.weight"] = torch.ones(DIM, dtype=torch.float16)
        torch.save(tensors, directory / f"consolidated.{shard:02d}.pth")


def in_fresh_process(what: str, base: Path, out: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.import", "--one", what, str(base), str(out)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def measure(what: str, base: Path, out: Path) -> dict[str, float]:
    """Seconds until everything is on disk, and this process's peak memory."""
    os.sync()
    start, busy = time.perf_counter(), time.process_time()
    if what == "copy":
        for path in base.iterdir():
            shutil.copyfile(path, out / path.name)
    else:
        MetaBase(base).convert(out)
    for path in out.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "cpu_seconds": time.process_time() - busy,
        "peak_bytes": peak_memory(),
    }


def peak_memory() -> int:
    """Most memory this process held; `ru_maxrss` would include what the parent held at the fork."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if "VmHWM" in line)


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
