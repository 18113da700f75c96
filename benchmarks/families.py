"""The family matrix: what a tiny random model of every supported family does with an adapter.

python -m benchmarks.families                     # the table, as markdown
python -m benchmarks.families --write docs/families.md
python -m benchmarks.families --all --write docs/families.md   # every type of transformers
python -m benchmarks.families --vision --write docs/families.md # every vision encoder
python -m benchmarks.families --train --write docs/families.md # train, chat and export
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache

from benchmarks.family_sweep import Check, append_row, check_type, decoder_types, read_rows, sweep
from benchmarks.family_training import TYPES, train_type, training_table
from benchmarks.family_vision import check_vision_type, vision_table, vision_types
from llama_adapter import LlamaAdapterConfig, LlamaAdapterForConditionalGeneration
from llama_adapter.families.projections import relative_difference, run_attention
from llama_adapter.families.structure import CACHE

VOCABULARY = 97
BEGIN, END = "<!-- begin families -->", "<!-- end families -->"
TRAINING_BEGIN, TRAINING_END = "<!-- begin training -->", "<!-- end training -->"
SWEEP_BEGIN, SWEEP_END = "<!-- begin sweep -->", "<!-- end sweep -->"
VISION_BEGIN, VISION_END = "<!-- begin vision -->", "<!-- end vision -->"

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"head_dim": 16, "sliding_window": 6},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 16},
    "gemma3_text": {"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 16},
    "phi3": {},
    "granite": {"attention_multiplier": 0.3, "residual_multiplier": 0.5},
    "smollm3": {"no_rope_layers": [1, 1, 1, 0]},
    "olmo2": {},
    "gpt_neox": {"num_key_value_heads": None},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    "qwen3_moe": {"num_experts": 4, "head_dim": 16, **_EXPERTS},
}
"""Every supported family with what makes it itself: windows, key norms, soft caps, experts."""

WITHOUT_SDPA = ("gemma2",)
"""Families whose soft-capped scores transformers runs by its eager function alone."""

COMPILED = ("llama", "qwen3", "gemma3_text")
"""Families whose forward and decode must compile to one graph."""


def implementations(family: str) -> tuple[str, ...]:
    """Attention implementations that the family has on a CPU, but for flex_attention."""
    return ("eager",) if family in WITHOUT_SDPA else ("eager", "sdpa")


def make_base(family: str, *, implementation: str | None = None, seed: int = 0) -> Any:
    """A tiny random model of the real class."""
    settings = {k: v for k, v in (COMMON | FAMILIES[family]).items() if v is not None}
    settings["eos_token_id"] = None
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **settings)
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation=implementation or implementations(family)[-1]
    )
    return model.eval()


def make_vision_encoder(seed: int = 1) -> Any:
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        "siglip_vision_model",
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    return transformers.AutoModel.from_config(config).eval()


def make_adapted(
    base: Any, *, preset: str = "v2", **options: Any
) -> LlamaAdapterForConditionalGeneration:
    sizes = {
        "prompt_length": 5,
        "visual_layers": 2,
        "visual_prompt_length": 6,
        "projector_width": 32,
        "projector_heads": 4,
    }
    config = LlamaAdapterConfig.preset(preset, **{**sizes, **options})
    return LlamaAdapterForConditionalGeneration.from_base(
        base, make_vision_encoder(), config, seed=0
    )


def stir(model: LlamaAdapterForConditionalGeneration, *, size: float = 0.1) -> None:
    """Random values in every trainable."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in model.adapter.named_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)


def inputs() -> tuple[Tensor, Tensor]:
    """Two rows of ten tokens, longer than the sliding windows, and an image each."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, VOCABULARY, (2, 10), generator=generator)
    return ids, torch.randn(2, 3, 16, 16, generator=generator)


def noop_difference(family: str, implementation: str | None = None) -> float:
    """How far a fresh adapter moves the logits; it must be exactly 0."""
    base = make_base(family, implementation=implementation)
    ids, images = inputs()
    with torch.no_grad():
        expected = base(ids).logits
        model = make_adapted(base)
        return float((model(ids, pixel_values=images).logits - expected).abs().max())


@torch.no_grad()
def oracle(family: str) -> float:
    """How far keys and values of prompts are from the module's own, with learned values."""
    model = make_adapted(make_base(family))
    stir(model)
    x_1Md = torch.linspace(-1, 1, 2 * COMMON["hidden_size"]).view(1, 2, -1)
    return max(
        relative_difference(ours, own)
        for attention, prompt in model.adapter.prompts()
        for ours, own in zip(
            prompt.project(attention, x_1Md),
            run_attention(attention, x_1Md, prompt.project.inputs),
            strict=True,
        )
    )


def cache_difference(family: str, implementation: str | None = None) -> float:
    """Largest difference of logits between one pass and token by token with a cache."""
    model = make_adapted(make_base(family, implementation=implementation))
    stir(model)
    ids, images = inputs()
    rows = torch.arange(len(ids))
    with torch.no_grad():
        whole = model(ids, pixel_values=images).logits
        visual = model.encode_visual(images, cache=True)
        past, parts = None, []
        for piece in ids.split([4] + [1] * 6, dim=1):
            output = model(
                piece,
                cache=past,
                visual_prompts=visual,
                image_index=rows,
                use_cache=True,
            )
            past = output[CACHE]
            parts.append(output.logits)
    return float((torch.cat(parts, dim=1) - whole).abs().max())


def compile_difference(family: str, *, backend: str = "inductor") -> float:
    """Largest difference of compiled logits: one pass, and a decode step on a static cache.

    Raises torch._dynamo.exc.Unsupported if either is not one graph.
    """
    torch.compiler.reset()
    model = make_adapted(make_base(family))
    stir(model)
    model.prepare_for_inference()
    ids, images = inputs()
    rows = torch.arange(len(ids))

    def forward(tokens: Tensor, **options: Any) -> Tensor:
        return model(tokens, image_index=rows, **options).logits

    compiled: Callable[..., Tensor] = torch.compile(forward, fullgraph=True, backend=backend)
    with torch.no_grad():
        visual = model.encode_visual(images, cache=True)
        worst = _gap(
            compiled(ids, visual_prompts=visual, use_cache=False),
            forward(ids, visual_prompts=visual, use_cache=False),
        )
        logits = []
        for step in (compiled, forward):
            cache = StaticCache(config=model.config, max_cache_len=16)
            position = torch.arange(9)[None].expand(2, -1)
            options = {"visual_prompts": visual, "cache": cache, "use_cache": True}
            forward(ids[:, :9], position_ids=position, **options)
            logits.append(step(ids[:, 9:], position_ids=position[:, :1] + 9, **options))
    return max(worst, _gap(*logits))


def _gap(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max())


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One family's line in the matrix."""

    family: str
    noop: float
    oracle: float
    cached: float
    compiled: float | None

    def markdown(self) -> str:
        compiled = "–" if self.compiled is None else f"yes ({self.compiled:.0e})"
        return (
            f"| {self.family} | {self.noop} | {self.oracle:.1g} | {self.cached:.0e} | {compiled} |"
        )


def measure(family: str, *, backend: str) -> Row:
    return Row(
        family=family,
        noop=max(noop_difference(family, name) for name in implementations(family)),
        oracle=oracle(family),
        cached=max(cache_difference(family, name) for name in implementations(family)),
        compiled=compile_difference(family, backend=backend) if family in COMPILED else None,
    )


def table(rows: list[Row], *, backend: str) -> str:
    made = (
        f"Made by `python -m benchmarks.families --write docs/families.md` on "
        f"{datetime.now(UTC).date()} with torch {torch.__version__}, transformers "
        f"{transformers.__version__}, float32 on the CPU, compiled by {backend}."
    )
    head = (
        "| family | fresh adapter: change of logits | oracle difference | "
        "cached − uncached | one graph (difference) |\n|---|---|---|---|---|"
    )
    return "\n".join([made, "", head, *(row.markdown() for row in rows)])


def put_between(path: Path, begin: str, end: str, text: str) -> None:
    """Replace what stands between two markers of a file."""
    between = re.compile(f"{re.escape(begin)}.*{re.escape(end)}", re.DOTALL)
    path.write_text(between.sub(lambda _: f"{begin}\n{text}\n{end}", path.read_text()))


def run_sweep(
    types: list[str], results: Path, check: Check, *, only: list[str]
) -> list[dict[str, Any]]:
    """Rows of every type, or of those so far and `only` some more; progress is on stderr."""
    results.parent.mkdir(parents=True, exist_ok=True)
    for row in sweep(only or types, results, check):
        print(f"{row['status']:9} {row['type']}", file=sys.stderr, flush=True)
    known = read_rows(results)
    return [known[model_type] for model_type in types if model_type in known]


def sweep_table(
    rows: list[dict[str, Any]],
    accepted_lines: Callable[[list[dict[str, Any]]], list[str]],
    *,
    option: str,
    count: int,
) -> str:
    """How many types are accepted and refused, and each with its columns or its reason."""
    by_status = {
        status: [row for row in rows if row["status"] == status]
        for status in ("accepted", "refused", "unsound", "unbuilt", "wrong")
    }
    counts = ", ".join(f"{len(found)} {status}" for status, found in by_status.items())
    lines = [
        f"Made by `python -m benchmarks.families {option}` on {datetime.now(UTC).date()} with "
        f"torch {torch.__version__}, transformers {transformers.__version__}, float32 on the CPU: "
        f"{counts}" + (f"; {count - len(rows)} more were not tried." if count > len(rows) else "."),
        "",
        *accepted_lines(by_status.pop("accepted")),
        "",
        "| not adapted | | reason |",
        "|---|---|---|",
    ]
    for status, found in by_status.items():
        for row in found:
            reason = " ".join(row["reason"].split()).partition(" cannot be adapted: ")
            lines.append(f"| {row['type']} | {status} | {reason[2] or reason[0]} |")
    return "\n".join(lines)


def decoder_lines(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each accepted decoder."""
    lines = [
        "| type | layers with static, visual prompts | change of logits | cached − uncached "
        "(of the bare base) | padded on the left − alone (of the bare base) |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['type']} | {row['static']}, {row['visual']} | {row['noop']} | "
            f"{_number(row, 'cached')} ({_number(row, 'base_cached')}) | "
            f"{_number(row, 'padded')} ({_number(row, 'base_padded')}) |"
        )
    return lines


def _number(row: dict[str, Any], name: str) -> str:
    value = row.get(name)
    return "–" if value is None else f"{value:.0e}"


SWEEPS: dict[str, tuple[Any, ...]] = {
    "all": (decoder_types, check_type, decoder_lines, SWEEP_BEGIN, SWEEP_END),
    "vision": (vision_types, check_vision_type, vision_table, VISION_BEGIN, VISION_END),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=FAMILIES, action="append", help="only these")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--write", type=Path, help="put the table between the file's markers")
    parser.add_argument("--all", action="store_true", help="every causal type of transformers")
    parser.add_argument("--vision", action="store_true", help="every vision encoder type")
    parser.add_argument("--results", type=Path, help="rows so far of --all, --vision or --train, "
                        "in runs/ if not given; what is there is not run again")  # fmt: skip
    parser.add_argument("--type", action="append", help="with --all and --vision: try only these")
    parser.add_argument("--train", action="store_true", help="train, chat and export")
    options = parser.parse_args()
    if options.train:
        results = options.results or Path("runs/families-train.jsonl")
        results.parent.mkdir(parents=True, exist_ok=True)
        for name in (name for name in TYPES if name not in read_rows(results)):
            with tempfile.TemporaryDirectory() as folder:
                append_row(results, train_type(name, Path(folder)))
        known = read_rows(results)
        text = training_table([known[name] for name in TYPES])
        print(text)
        if options.write is not None:
            put_between(options.write, TRAINING_BEGIN, TRAINING_END, text)
        return
    if options.all or options.vision:
        kind = "vision" if options.vision else "all"
        types, check, lines, *markers = SWEEPS[kind]
        results = options.results or Path(f"runs/families-{kind}.jsonl")
        rows = run_sweep(types(), results, check, only=options.type or [])
        text = sweep_table(rows, lines, option=f"--{kind}", count=len(types()))
        print(text)
        if options.write is not None:
            put_between(options.write, *markers, text)
        return
    measured = [measure(family, backend=options.backend) for family in options.family or FAMILIES]
    text = table(measured, backend=options.backend)
    print(text)
    if options.write is not None:
        put_between(options.write, BEGIN, END, text)


if __name__ == "__main__":
    main()
