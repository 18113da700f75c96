"""Every causal language model type that transformers registers, on a tiny random model of it.

`python -m benchmarks.families --all` runs it. Each type runs in a process of its own with a limit
of time and memory; results are JSON lines, and a run goes on where an earlier one stopped.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from benchmarks.tiny_models import VOCABULARY, CannotBuildError, tiny_base, tiny_vision_encoder
from llama_adapter import LlamaAdapterConfig, LlamaAdapterForConditionalGeneration
from llama_adapter.errors import LlamaAdapterError
from llama_adapter.families.structure import CACHE

TIME_LIMIT = 150
"""Seconds of a processor; of the clock it may be more where others use the machine too."""

WALL_LIMIT = 4 * TIME_LIMIT
MEMORY_LIMIT = 12 << 30
TOLERANCE = 2e-4
"""Of the largest logit: float32 sums in another order."""

UNSOUND = 1e-2
"""A base that differs more by itself, with a cache and without, says nothing about ours."""

LENGTH = 12


class WrongError(Exception):
    """An accepted model that does not do what it should."""


def decoder_types() -> list[str]:
    """Types with a causal language model that decodes alone: no encoders, no encoder-decoders."""
    return [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if _decodes_alone(name)]


def _decodes_alone(model_type: str) -> bool:
    cls = CONFIG_MAPPING[model_type]
    fields = {"is_decoder", "is_encoder_decoder", "use_cross_attention"}
    given = {name: getattr(cls, name, None) for name in fields}
    return given["is_decoder"] is None and not given["is_encoder_decoder"]


def adapted(base: Any) -> LlamaAdapterForConditionalGeneration:
    """The v2 preset with one layer of visual prompts and static prompts in all others."""
    config = LlamaAdapterConfig.preset(
        "v2", prompt_length=5, visual_prompt_length=6, projector_width=32, projector_heads=4
    )
    return LlamaAdapterForConditionalGeneration.from_base(
        base, tiny_vision_encoder(), config, seed=0
    )


def randomize(model: LlamaAdapterForConditionalGeneration, *, size: float = 0.1) -> None:
    """Random values in every trainable."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in model.adapter.named_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)


def check_type(model_type: str) -> dict[str, Any]:
    """What a tiny model of a type does with an adapter, as a line of the table."""
    row: dict[str, Any] = {"type": model_type}
    try:
        base = tiny_base(model_type)
    except CannotBuildError as error:
        return row | {"status": "unbuilt", "reason": str(error)[:300]}
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, VOCABULARY, (2, LENGTH), generator=generator)
    features = torch.randn(2, 4, 32, generator=generator)
    try:
        with torch.no_grad():
            expected = base(input_ids=ids, use_cache=False).logits
        row["base_cached"], row["base_padded"] = _of_base(base, ids, expected)
        model = adapted(base)
        if (row["base_cached"] or 0.0) > UNSOUND:
            reason = f"the bare base differs with a cache by {row['base_cached']:.2g}"
            return row | {"status": "unsound", "reason": reason}
        row |= {"static": 0, "visual": 0, "trainables": len(list(model.adapter.trainables()))}
        for _, prompt in model.adapter.prompts():
            row["visual" if prompt.reads_images else "static"] += 1
        row["noop"] = _noop(model, expected, ids, features)
        randomize(model)
        _gradients(model, ids, features)
        _prompts_matter(model, ids, features)
        row["cached"] = _cached(model, ids, features, own=row["base_cached"] or 0.0)
        row["padded"] = _left_padded(model, ids, features)
    except LlamaAdapterError as error:
        return row | {"status": "refused", "reason": str(error)[:300]}
    except WrongError as error:
        return row | {"status": "wrong", "reason": str(error)[:300]}
    except Exception as error:
        return row | {"status": "wrong", "reason": f"{type(error).__name__}: {error}"[:300]}
    return row | {"status": "accepted"}


@torch.no_grad()
def _of_base(base: Any, ids: Tensor, whole: Tensor) -> tuple[float | None, float | None]:
    """How exact the bare base is with a cache, and padded on the left; None where it fails."""
    past, parts = None, []
    try:
        for piece in ids.split([5] + [1] * (LENGTH - 5), dim=1):
            output = base(input_ids=piece, use_cache=True, **{CACHE: past})
            past = output.get(CACHE)
            parts.append(output.logits)
        cached = _relative(torch.cat(parts, dim=1), whole)
    except Exception:
        cached = None
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    place = (mask.cumsum(-1) - 1).clamp(min=0)
    try:
        options = {"attention_mask": mask, "position_ids": place, "use_cache": False}
        padded = base(input_ids=ids * mask, **options).logits[:1, 3:]
        alone = base(input_ids=ids[:1, 3:], use_cache=False).logits
        return cached, _relative(padded, alone)
    except Exception:
        return cached, None


def _noop(model: Any, expected: Tensor, ids: Tensor, features: Tensor) -> float:
    with torch.no_grad():
        logits = model(input_ids=ids, visual_features=features, use_cache=False).logits
    difference = float((logits - expected).abs().max())
    if difference != 0:
        raise WrongError(f"a fresh adapter changes the logits by {difference:.2g}")
    return difference


def _gradients(model: Any, ids: Tensor, features: Tensor) -> None:
    model.train()
    model(input_ids=ids, visual_features=features, labels=ids, use_cache=False).loss.backward()
    without = [
        name
        for name, parameter in model.adapter.named_parameters()
        if parameter.grad is None or not parameter.grad.abs().sum() > 0
    ]
    model.zero_grad()
    model.eval()
    if without:
        raise WrongError(f"{len(without)} trainables get no gradient, such as {without[0]}")


@torch.no_grad()
def _prompts_matter(model: Any, ids: Tensor, features: Tensor) -> None:
    """Without the gates of any one layer the logits must be others."""
    options = {"visual_features": features, "use_cache": False}
    logits = model(input_ids=ids, **options).logits
    for attention, prompt in model.adapter.prompts():
        gate = prompt.gate.clone()
        prompt.gate.zero_()
        difference = float((model(input_ids=ids, **options).logits - logits).abs().max())
        prompt.gate.copy_(gate)
        if not difference > 0:
            kind = type(attention).__name__
            raise WrongError(f"prompts of layer {prompt.layer_index} ({kind}) change nothing")


def _relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@torch.no_grad()
def _cached(model: Any, ids: Tensor, features: Tensor, *, own: float) -> float:
    """One pass against the first tokens and then token by token behind a cache.

    Must be as exact as the base is by itself, or nearly.
    """
    visual = model.encode_visual(visual_features=features, cache=True)
    whole = model(input_ids=ids, visual_prompts=visual, use_cache=False).logits
    past, parts = None, []
    for piece in ids.split([5] + [1] * (LENGTH - 5), dim=1):
        output = model(
            input_ids=piece,
            cache=past,
            visual_prompts=visual,
            image_index=torch.arange(len(ids)),
            use_cache=True,
        )
        past = output.get(CACHE)
        if past is None:
            raise WrongError("it returns no cache")
        parts.append(output.logits)
    difference = _relative(torch.cat(parts, dim=1), whole)
    if not difference <= max(TOLERANCE, 2 * own):
        raise WrongError(f"cached logits differ from uncached ones by {difference:.2g}")
    return difference


@torch.no_grad()
def _left_padded(model: Any, ids: Tensor, features: Tensor) -> float:
    """A row padded on the left against the row alone."""
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    padded = model(
        input_ids=ids * mask, attention_mask=mask, visual_features=features, use_cache=False
    ).logits[:1, 3:]
    alone = model(input_ids=ids[:1, 3:], visual_features=features[:1], use_cache=False).logits
    return _relative(padded, alone)


Check = Callable[[str], dict[str, Any]]
"""Makes the row of a type."""


def _run(check: Check, model_type: str, path: Path) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    resource.setrlimit(resource.RLIMIT_CPU, (TIME_LIMIT, TIME_LIMIT))
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        append_row(path, check(model_type))


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Add the row of a type to those of earlier runs."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def read_rows(path: Path) -> dict[str, dict[str, Any]]:
    """Rows of earlier runs by type."""
    if not path.exists():
        return {}
    rows = (json.loads(line) for line in path.read_text().splitlines())
    return {row["type"]: row for row in rows}


def sweep(types: Iterable[str], path: Path, check: Check) -> Iterator[dict[str, Any]]:
    """Check types that `path` does not have yet, each in a process of its own."""
    context = multiprocessing.get_context("fork")
    for model_type in types:
        if model_type in read_rows(path):
            continue
        process = context.Process(target=_run, args=(check, model_type, path))
        process.start()
        process.join(WALL_LIMIT)
        reason = f"ended with exit status {process.exitcode}" if process.exitcode else None
        if process.is_alive() or process.exitcode in (-signal.SIGXCPU, -signal.SIGKILL):
            process.kill()
            process.join()
            reason = f"no result within {TIME_LIMIT} s"
        if reason is not None:
            append_row(path, {"type": model_type, "status": "unbuilt", "reason": reason})
        yield read_rows(path)[model_type]
