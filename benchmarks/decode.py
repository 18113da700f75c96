"""Prefill and decode of a prepared adapter with an image, against the base model alone.

    python -m benchmarks.decode                       # a small Llama, fp32 on the CPU
    python -m benchmarks.decode --device cuda --dtype bfloat16

Both run in turn in one process, a token each, so that a busy machine slows both; what counts is
the median of the ratios. Every 20 rounds both get new memory, since where weights lie in it decides
too. Targets: decode at most 1.05, prefill at most 1.10.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import StaticCache

from benchmarks.measuring import (
    add_options,
    interleaved,
    make_llama,
    make_vision_encoder,
    place_alike,
    report,
    synchronized,
)
from llama_adapter import LlamaAdapterConfig, LlamaAdapterForConditionalGeneration
from llama_adapter.families.structure import CACHE

TARGETS = {"decode": 1.05, "prefill": 1.10}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser, rounds=200)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--preset", default="v2")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    base = make_llama(options)
    adapted = LlamaAdapterForConditionalGeneration.from_base(
        make_llama(options),
        make_vision_encoder(options),
        LlamaAdapterConfig.preset(options.preset),
        seed=0,
    )
    with torch.no_grad():
        for _, parameter in adapted.adapter.named_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    adapted.prepare_for_inference()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 1000, (1, options.prompt_tokens), generator=generator).to(options.device)
    image = torch.randn(1, 3, 64, 64, generator=generator).to(options.device)
    with torch.inference_mode():
        visual = adapted.encode_visual(image, cache=True)
        reading = {"visual_prompts": visual, "image_index": torch.zeros(1, dtype=torch.long)}
        reading["image_index"] = reading["image_index"].to(options.device)
        sides: dict[str, tuple[Any, dict[str, Any]]] = {
            "base": (base, {}),
            "adapted": (adapted, reading),
        }
        prefill = {
            name: synchronized(_prefill(model, ids, extra), options.device)
            for name, (model, extra) in sides.items()
        }
        decode = {
            name: synchronized(_decode(model, ids, extra, options.rounds), options.device)
            for name, (model, extra) in sides.items()
        }
        place = partial(place_alike, base, adapted)
        rounds = {"prefill": max(10, options.rounds // 5), "decode": options.rounds}
        results = {
            name: interleaved(work, over="base", rounds=rounds[name], between=place)
            for name, work in (("prefill", prefill), ("decode", decode))
        }
    report("decode", results, targets=TARGETS, options=options)


def _prefill(model: Any, ids: torch.Tensor, extra: dict[str, Any]) -> Callable[[], None]:
    return lambda: model(ids, use_cache=True, logits_to_keep=1, **extra)


def _decode(
    model: Any, ids: torch.Tensor, extra: dict[str, Any], rounds: int
) -> Callable[[], None]:
    """One greedy token a call, after a prefill; the static cache keeps its size."""
    length = ids.shape[1]
    # room for the turns that are not timed: at first, and after each change of memory
    cache = StaticCache(config=model.config, max_cache_len=length + rounds + rounds // 20 + 16)
    known = {CACHE: cache, "use_cache": True}
    model(ids, **known, **extra)
    position = torch.full((1, 1), length, device=ids.device)
    token = ids[:, -1:]

    def step() -> None:
        nonlocal token, position
        output = model(token, position_ids=position, **known, **extra)
        token = output.logits[:, -1:].argmax(-1)
        position = position + 1

    return step


if __name__ == "__main__":
    main()
