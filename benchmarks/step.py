"""One training step against peft's adapters of the same shape, in time and peak memory.

    python -m benchmarks.step                         # a small Llama, fp32 on the CPU
    python -m benchmarks.step --device cuda --dtype bfloat16

V1 is held against peft's AdaptionPrompt (same prompts, same layers); full V2, projector and visual
prompts included, against LoRA of rank 8 on every linear. The frozen vision encoder's features are
given: it is not part of the adapter, and peft's side has none. Half of each row is prompt and not
scored: ours computes logits where a label is, as its trainer does; peft's side is the base's loss.

Both sides of a pair run in turn in one process, their weights in new memory every 10 rounds; memory
is the growth of the peak in three steps, each side in a process of its own.
Targets: at most 0.90 of peft's time, and no more memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft import AdaptionPromptConfig, LoraConfig, get_peft_model
from torch import nn

from benchmarks.measuring import (
    add_options,
    interleaved,
    make_llama,
    make_vision_encoder,
    peak_memory,
    place_alike,
    report,
    reset_peak_memory,
    synchronized,
)
from llama_adapter import LlamaAdapterConfig, LlamaAdapterForConditionalGeneration
from llama_adapter.model import answer_mask

PAIRS = {"v1": "adaption_prompt", "v2": "lora"}
TARGETS = dict.fromkeys(PAIRS, 0.90)
Step = Callable[[], None]
Side = tuple[nn.Module, Step]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser, rounds=30)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--side", choices=SIDES, help="three steps of one side: its peak memory")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.side:
        print(json.dumps(_memory_of(options)))
        return
    results = {}
    for ours, theirs in PAIRS.items():
        made = {name: SIDES[name](options) for name in (theirs, ours)}
        place = partial(place_alike, *(model for model, _ in made.values()))
        sides = {name: synchronized(step, options.device) for name, (_, step) in made.items()}
        results[ours] = interleaved(
            sides, over=theirs, rounds=options.rounds, warmup=2, every=10, between=place
        )
        grown = {name: _memory_in_a_process(name, options) for name in sides}
        results[ours]["peak_growth_mebibytes"] = {n: round(b / 2**20, 1) for n, b in grown.items()}
        results[ours]["memory_ratio"] = round(grown[ours] / grown[theirs], 3)
    report("step", results, targets=TARGETS, options=options)


def _ours(preset: str) -> Callable[[argparse.Namespace], Side]:
    def make(options: argparse.Namespace) -> Side:
        # as in the paper's 7B: the projector an eighth as wide as the decoder
        shape = {"projector_width": options.hidden // 8}
        if preset == "v1":
            shape["prompt_layers"] = options.layers - 1
        config = LlamaAdapterConfig.preset(preset, **shape)
        sees = config.adapter_config.is_multimodal
        model = LlamaAdapterForConditionalGeneration.from_base(
            make_llama(options), make_vision_encoder(options) if sees else None, config, seed=0
        )
        trainable = [*model.group_parameters("language"), *model.group_parameters("vision")]
        extra = {}
        if sees:
            width = model.vision.config.hidden_size
            extra["visual_features"] = torch.randn(options.batch, 64, width, device=options.device)
        return _step(model.train(), trainable, options, extra)

    return make


def _adaption_prompt(options: argparse.Namespace) -> Side:
    config = AdaptionPromptConfig(
        adapter_len=10, adapter_layers=options.layers - 1, task_type="CAUSAL_LM"
    )
    return _peft(config, options)


def _lora(options: argparse.Namespace) -> Side:
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return _peft(config, options)


def _peft(config: Any, options: argparse.Namespace) -> Side:
    model = get_peft_model(make_llama(options), config)
    trainable = [p for p in model.parameters() if p.requires_grad]
    return _step(model.train(), trainable, options, {})


SIDES: dict[str, Callable[[argparse.Namespace], Side]] = {
    "v1": _ours("v1"),
    "v2": _ours("v2"),
    "adaption_prompt": _adaption_prompt,
    "lora": _lora,
}


def _step(
    model: nn.Module,
    trainable: list[nn.Parameter],
    options: argparse.Namespace,
    extra: dict[str, torch.Tensor],
) -> Side:
    """The model; forward, loss, backward and AdamW on one fixed batch."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 1000, (options.batch, options.tokens), generator=generator)
    ids = ids.to(options.device)
    labels = ids.clone()
    labels[:, : options.tokens // 2] = -100
    if isinstance(model, LlamaAdapterForConditionalGeneration):
        extra = {**extra, "logits_to_keep": answer_mask(labels)}
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=labels, use_cache=False, **extra).loss.backward()
        optimizer.step()

    return model, step


def _memory_in_a_process(side: str, options: argparse.Namespace) -> int:
    command = [sys.executable, "-m", "benchmarks.step", "--side", side]
    for name in ("device", "dtype", "hidden", "layers", "batch", "tokens", "threads"):
        command += [f"--{name}", str(getattr(options, name))]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(json.loads(done.stdout.splitlines()[-1]))


def _memory_of(options: argparse.Namespace) -> int:
    _, step = SIDES[options.side](options)
    before = reset_peak_memory(options.device)
    for _ in range(3):
        step()
    return peak_memory(options.device) - before


if __name__ == "__main__":
    main()
