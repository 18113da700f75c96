"""Telling one base from another without reading all of it.

A fingerprint is taken of a few values of every tensor, spread over its length, in each dtype that
the model may be loaded in: values stored in float32 and loaded in float16 round as they rounded
when the fingerprint was taken. Of a quantized base only embeddings and norms are compared, which
no quantization touches. The config is compared setting by setting.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llama_adapter.config import differing, shown
from llama_adapter.errors import CheckpointError
from llama_adapter.families.offloading import weights_at_hand
from llama_adapter.model.peft_base import base_parameters

PLACES = 64
"""Values of each tensor that a fingerprint covers."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ALL, UNQUANTIZED = "all", "unquantised"

_BOOKKEEPING = re.compile(
    r"^_|_token_ids?$|dropout|droprate|drop_path|initializer|(^|_)(dtype|implementation|plan)$|"
    r"^(architectures|auto_map|gradient_checkpointing|id2label|label2id|name_or_path|output_\w+|"
    r"pretraining_tp|problem_type|quantization_config|return_dict|task_specific_params|"
    r"tie_word_embeddings|torchscript|transformers_version|use_cache)$"
)
"""Settings that change nothing of what a frozen model computes from its tensors."""
_CONTEXT = "max_position_embeddings"
_FREE_CONTEXT = ("default", "linear", "llama3")
"""Rotations that do not depend on how long the longest text may be."""

Sample = tuple[str, tuple[int, ...], Tensor]


def places(numel: int) -> Tensor:
    """Indices of the values that are sampled: all, or `PLACES` from the first to the last."""
    if numel <= PLACES:
        return torch.arange(numel)
    return torch.arange(PLACES) * (numel - 1) // (PLACES - 1)


def is_quantized(model: Any) -> bool:
    """Whether some of a model's tensors hold codes instead of values."""
    return (
        getattr(model, "hf_quantizer", None) is not None
        or getattr(model.config, "quantization_config", None) is not None
    )


def is_never_quantized(name: str) -> bool:
    """Whether a parameter is embedding-like or norm-like, which no quantization touches."""
    return "norm" in name.lower() or "embed" in name.lower()


def fingerprints(model: Any) -> dict[str, Any] | None:
    """The fingerprints of a model's tensors; None for a model on the meta device.

    Adapters must be off, and those of peft do not count; what is offloaded is fetched.
    """
    samples = []
    quantized = is_quantized(model)
    for name, values in base_values(model, unquantized_only=quantized):
        if values.is_meta:
            return None
        if values.is_floating_point():
            samples.append((name, tuple(values.shape), sampled(values)))
    return fingerprints_of(samples, dtype=model.dtype, quantized=quantized)


def base_values(model: Any, *, unquantized_only: bool) -> Iterator[tuple[str, Tensor]]:
    """The base's parameters by plain name; an offloaded one is fetched until the next is read."""
    for plain, name in base_parameters(model):
        if unquantized_only and not is_never_quantized(plain):
            continue
        module_name, _, own_name = name.rpartition(".")
        module = model.get_submodule(module_name)
        with weights_at_hand(module, recurse=False):
            yield plain, module.get_parameter(own_name).detach()


def sampled(values: Tensor) -> Tensor:
    """The values of a tensor that its fingerprint covers."""
    flat = values.reshape(-1)
    return flat[places(flat.numel()).to(flat.device)].cpu()


def fingerprints_of_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """The fingerprints of tensors by name; None where some have no values here."""
    if any(tensor.is_meta for tensor in tensors.values()):
        return None
    samples = [(name, tuple(t.shape), sampled(t.detach())) for name, t in tensors.items()]
    dtypes = {tensor.dtype for tensor in tensors.values() if tensor.ndim}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    return fingerprints_of(samples, dtype=dtype, quantized=False)


def fingerprints_of(
    samples: Iterable[Sample], *, dtype: torch.dtype | str, quantized: bool
) -> dict[str, Any]:
    """Fingerprints of sampled tensors: names, full shapes and values in each dtype."""
    ordered = sorted(samples, key=lambda sample: sample[0])
    kept = [sample for sample in ordered if is_never_quantized(sample[0])]
    return {
        "dtype": str(dtype).removeprefix("torch."),
        ALL: None if quantized else _in_each_dtype(ordered),
        UNQUANTIZED: _in_each_dtype(kept),
    }


def _in_each_dtype(samples: list[Sample]) -> dict[str, str]:
    found = {}
    for name, dtype in DTYPES.items():
        digest = hashlib.sha256()
        for key, shape, values in samples:
            digest.update(f"{key}{shape}".encode())
            digest.update(values.to(dtype).float().numpy().tobytes())
        found[name] = digest.hexdigest()[:32]
    return found


def compare_weights(
    found: Mapping[str, Any], expected: Mapping[str, Any], *, refuse: Callable[[str, str], None]
) -> None:
    """Call `refuse` with two fingerprints where they are of different tensors.

    Between float16 and bfloat16 neither rounding tells what the other was; that is said.
    """
    part = ALL if found[ALL] is not None and expected[ALL] is not None else UNQUANTIZED
    ours, theirs = found[part], expected[part]
    halves = {found["dtype"], expected["dtype"]} - {"float32"}
    if any(ours[name] == theirs[name] for name in (halves or {"float32"}) if name in DTYPES):
        return
    if len(halves) > 1:
        warnings.warn(
            f"a base that was saved in {expected['dtype']} cannot be compared in "
            f"{found['dtype']}: whether it is the same was not checked",
            stacklevel=2,
        )
        return
    [name] = halves or {"float32"}
    refuse(ours.get(name, ""), theirs.get(name, ""))


def settings_of(config: Any) -> dict[str, Any]:
    """Everything of a config that may change what a frozen model computes, JSON-ready."""
    values = json.loads(json.dumps(config.to_dict(), default=str))
    kept = {key: value for key, value in values.items() if not _BOOKKEEPING.search(key)}
    rotation = kept.get("rope_parameters") or kept.get("rope_scaling") or {}
    if rotation.get("rope_type", "default") in _FREE_CONTEXT:
        kept.pop(_CONTEXT, None)
    return kept


def check_settings(
    found: Mapping[str, Any], expected: Mapping[str, Any], *, what: str, source: str
) -> None:
    """CheckpointError where a base computes something else with the same tensors."""
    for name, ours, theirs in differing(dict(found), dict(expected)):
        raise CheckpointError(
            f"{source} was saved for a {what} whose config has {name} {shown(theirs)}, "
            f"this {what} has {shown(ours)}"
        )


def check_form(value: Mapping[str, Any], *, where: str) -> None:
    """CheckpointError where stored fingerprints have not the form of such."""
    is_whole = value.keys() == {"dtype", ALL, UNQUANTIZED} and isinstance(value["dtype"], str)
    parts: list[Any] = [value.get(UNQUANTIZED)]
    if value.get(ALL) is not None:
        parts.append(value[ALL])
    for part in parts:
        is_whole = is_whole and isinstance(part, dict) and part.keys() == DTYPES.keys()
        is_whole = is_whole and all(isinstance(text, str) for text in part.values())
    if not is_whole:
        raise CheckpointError(f"{where} is damaged: it must hold a fingerprint for each dtype")


def describe_rule(reference: Mapping[str, Any] | None) -> str:
    """How a base is told from others of its shape, in words."""
    if reference is None or reference.get("fingerprint") is None:
        return "its shape alone: it had no weights when the adapter was saved"
    weights = reference.get("weights")
    if weights is None:
        return "its shape and the first values of embeddings and norms, as version 0.1 did"
    if weights[ALL] is None:
        return "its settings, and values of embeddings and norms: it was quantized"
    return (
        "its settings and values of every tensor; quantized, by its settings and values of "
        "embeddings and norms"
    )


def text_or_vision(model: nn.Module) -> Any:
    """The part of a model's config that describes what is used of it."""
    config: Any = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(config, "vision_config", text)
