"""What the speed benchmarks share: models, interleaved timing, peak memory, the JSON report."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel

LARGE = 2**18
"""Bytes from which on a weight counts as large; activations of a token are smaller."""


def add_options(parser: argparse.ArgumentParser, *, rounds: int) -> None:
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=rounds, help="timed turns of each side")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="also write the JSON there")


def make_llama(options: argparse.Namespace, *, seed: int = 0) -> LlamaForCausalLM:
    """A real Llama of random numbers, the same for the same seed."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=getattr(options, "vocabulary", 8000),
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 11 // 4,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    return model.to(options.device, getattr(torch, options.dtype))


def make_vision_encoder(options: argparse.Namespace) -> SiglipVisionModel:
    torch.manual_seed(1)
    config = SiglipVisionConfig(
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=64,
        patch_size=8,
    )
    return SiglipVisionModel(config).eval().to(options.device)


def place_alike(*models: nn.Module) -> None:
    """Give the large weights of all models new memory, in turn.

    Reading a weight can take a tenth longer where the allocator put it later, in the heap and not
    in pages of its own: whichever model was made last would lose. Where pages come to lie is luck
    all the same (two equal models differ by 2 in 100), so a long measurement does this repeatedly.
    """
    large = [[p for p in m.parameters() if p.nbytes >= LARGE] for m in models]
    for weights in zip_longest(*large):
        for weight in weights:
            if weight is not None:
                weight.data = weight.data.clone()


def synchronized(work: Callable[[], Any], device: str) -> Callable[[], None]:
    """The work, and the wait until the device has done it."""

    def run() -> None:
        work()
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    return run


def interleaved(
    sides: dict[str, Callable[[], None]],
    *,
    over: str,
    rounds: int,
    warmup: int = 3,
    every: int = 20,
    between: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Every side once a round, in alternating order; medians and ratios of the same round.

    `between` is called before the first round and after `every` so many, untimed; one more untimed
    turn of each side follows it.
    """
    for work in sides.values():
        for _ in range(warmup):
            work()
    clocks = {"wall": time.perf_counter, "cpu": time.process_time}
    seconds: dict[str, dict[str, list[float]]] = {
        clock: {name: [] for name in sides} for clock in clocks
    }
    for turn in range(rounds):
        if between is not None and turn % every == 0:
            between()
            for work in sides.values():
                work()
        names = list(sides) if turn % 2 == 0 else list(sides)[::-1]
        for name in names:
            start = {clock: read() for clock, read in clocks.items()}
            sides[name]()
            for clock, read in clocks.items():
                seconds[clock][name].append(read() - start[clock])
    result: dict[str, Any] = {
        "milliseconds": {
            name: round(1e3 * statistics.median(spent), 3)
            for name, spent in seconds["wall"].items()
        }
    }
    other = next(name for name in sides if name != over)
    for clock, spent in seconds.items():
        ratios = [a / b for a, b in zip(spent[other], spent[over], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        # processor time does not count what other processes of a busy machine took
        name = "ratio" if clock == "wall" else "ratio_of_cpu_time"
        result[name] = round(middle, 4)
        result[f"{name}_quartiles"] = [round(low, 4), round(high, 4)]
    return result


def reset_peak_memory(device: str) -> int:
    """Bytes in use now; from here on the peak counts anew."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        return int(torch.cuda.memory_allocated())
    Path("/proc/self/clear_refs").write_text("5")
    return status_bytes("VmRSS")


def peak_memory(device: str) -> int:
    """Bytes at the peak: resident in this process on the CPU (Linux), allocated on a GPU."""
    return (
        int(torch.cuda.max_memory_allocated())
        if device.startswith("cuda")
        else status_bytes("VmHWM")
    )


def status_bytes(field: str, pid: int | str = "self") -> int:
    """What Linux says of a process, such as `VmRSS`."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def _anywhere(setting: Any) -> Any:
    """A setting as it is on any machine: of a path the part below the repository, or its name."""
    if not isinstance(setting, Path) or not setting.is_absolute():
        return setting
    root = Path(__file__).resolve().parents[1]
    return str(setting.relative_to(root)) if setting.is_relative_to(root) else setting.name


def report(
    name: str,
    results: dict[str, Any],
    *,
    targets: dict[str, float],
    options: argparse.Namespace,
) -> None:
    """Print one JSON object that names date, device, versions and settings."""
    for what, target in targets.items():
        results[what]["target"] = target
        results[what]["met"] = results[what]["ratio"] <= target
    text = json.dumps(describe(name, results, options=options), indent=2, default=str)
    print(text)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")


def describe(name: str, results: dict[str, Any], *, options: argparse.Namespace) -> dict[str, Any]:
    """Results with date, device, versions and settings."""
    return {
        "benchmark": name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name(options.device),
        "versions": _versions("torch", "transformers", "peft", "llama-adapter"),
        "settings": {k: _anywhere(v) for k, v in vars(options).items() if k != "out"},
        "results": results,
    }


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = lines[0].partition(":")[2].strip() if lines else cpu
    return f"{cpu}, {torch.get_num_threads()} threads"


def _versions(*names: str) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
