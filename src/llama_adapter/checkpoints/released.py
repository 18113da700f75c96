"""The files that the authors released: recognizing one, by its content alone.

Checkpoints of the authors' training scripts hold the same tensors, and in addition the frozen
base's, the vision encoder's, the optimizer and the settings of the run: those are left out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from torch import Tensor

from llama_adapter.checkpoints.torch_files import (
    INERT,
    check_archive,
    is_name,
    read_torch_file,
    why_not_float,
)
from llama_adapter.errors import CheckpointError


class Kind(StrEnum):
    """What a released file holds."""

    V1 = "v1-text"
    """Prompts and gates: a flat dictionary."""
    V2_BIAS = "v2-multimodal-bias"
    """BIAS-7B and CAPTION-7B: visual projection, prompts, biases, norms."""
    V2_LORA_BIAS = "v2-multimodal-lora-bias"
    """LORA-BIAS-7B of V2 and V2.1: the same, LoRA and a second gate."""
    V2_CHAT = "v2-chat"
    """Biases, input-side scales and norms; with or without prompts."""


NEEDS = {
    "V1 text": "adapter_query.weight and layers.N.attention.gate",
    "V2 multimodal": "visual_query.weight, adapter_query.weight and llama.layers.N.…",
    "V2 chat": "layers.N.attention.wq_bias and layers.N.attention.wq_scale",
}

_FROZEN = re.compile(
    r"(?P<prefix>llama\.)?(?P<name>(tok_embeddings|output)\.weight|rope\.freqs"
    r"|layers\.\d+\.(attention\.w[qkvo]|feed_forward\.w[123])\.weight)"
)
"""Tensors of the frozen base in a training checkpoint."""
_NORMS = re.compile(r"(layers\.\d+\.(attention|ffn)_)?norm\.weight")
"""Norms, which V1 leaves frozen."""
_ENCODER = "clip."
"""Before the names of the frozen vision encoder in a training checkpoint."""

_LITGPT = ("gating_factor", "adapter_wte.weight")

PROMPTS = "adapter_query.weight"
QUERY = "visual_query.weight"


@dataclass(frozen=True, kw_only=True, slots=True)
class Released:
    """A released file in memory."""

    path: Path
    kind: Kind
    tensors: dict[str, Tensor]
    """Tensors by the authors' names, in file order."""
    file_config: dict[str, Any] | None
    """The `config` that V2 multimodal files carry."""
    is_wrapped: bool
    """Whether the file is `{"model": tensors, ...}` rather than the tensors themselves."""
    frozen: dict[str, Tensor] = field(default_factory=dict)
    """The base's own tensors in a training checkpoint, by their names in Meta's layout."""
    left_out: tuple[str, ...] = ()
    """What else of a training checkpoint is not read."""

    @property
    def prefix(self) -> str:
        """What precedes `layers.N` in the authors' names."""
        is_multimodal = self.kind in (Kind.V2_BIAS, Kind.V2_LORA_BIAS)
        return "llama." if is_multimodal else ""

    @property
    def num_layers(self) -> int:
        """Layers that the file speaks of."""
        pattern = re.compile(rf"{re.escape(self.prefix)}layers\.(\d{{1,5}})\.")
        found = [int(match[1]) for name in self.tensors if (match := pattern.match(name))]
        return 1 + max(found, default=-1)


def read_released(path: Path) -> Released:
    """Read and recognize a released checkpoint.

    Raises CheckpointError for a damaged file, code in it, and unknown or mixed content; it says
    what was found and what each known kind needs.
    """
    content = read_torch_file(path, mmap=True, inert=INERT)  # it may hold a whole base
    check_archive(path)
    is_wrapped = isinstance(content, dict) and isinstance(content.get("model"), dict)
    named = content["model"] if is_wrapped else content
    if not isinstance(named, dict):
        raise _unknown(path, f"a {type(named).__name__}")
    for name, value in named.items():
        if not is_name(name) or not isinstance(value, Tensor):
            raise _unknown(path, f"{name!r:.80}, which is not a tensor")
    tensors = {name: value.detach().resolve_neg() for name, value in named.items()}
    if tensors and all(name.startswith("module.") for name in tensors):  # DistributedDataParallel
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    _refuse_litgpt(path, tensors)
    frozen, encoder = _take_frozen(tensors)
    left_out = [f"the vision encoder's {encoder} tensors"] if encoder else []
    if is_wrapped:
        left_out += [f"{key!r}" for key in content if key not in ("model", "config")]
    file_config = content.get("config") if is_wrapped else None
    if file_config is not None and not isinstance(file_config, dict):
        raise _unknown(path, f"a config that is a {type(file_config).__name__}")
    kind = _recognize(path, tensors)
    for name, tensor in tensors.items():
        if (why := why_not_float(tensor)) is not None:
            raise CheckpointError(f"{path}: tensor {name} {why}")
    if file_config is not None:
        _check_config(path, kind, file_config, tensors)
    return Released(
        path=path,
        kind=kind,
        tensors=tensors,
        file_config=file_config,
        is_wrapped=is_wrapped,
        frozen=frozen,
        left_out=tuple(left_out),
    )


def _take_frozen(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """Take the base's own tensors out; they, and how many the vision encoder had, taken out too."""
    frozen, encoder = {}, 0
    for name in list(tensors):
        match = _FROZEN.fullmatch(name)
        if match is not None:
            frozen[match["name"]] = tensors.pop(name)
        elif name.startswith(_ENCODER):
            del tensors[name]
            encoder += 1
    is_v1 = all(name.endswith(".gate") or name == PROMPTS or _NORMS.fullmatch(name)
                for name in tensors)  # fmt: skip
    if frozen and is_v1:
        frozen |= {name: tensors.pop(name) for name in list(tensors) if _NORMS.fullmatch(name)}
    return frozen, encoder


def _refuse_litgpt(path: Path, tensors: dict[str, Tensor]) -> None:
    if not any(name.endswith(_LITGPT) for name in tensors):
        return
    if any(name.startswith("lm_head.adapter_") for name in tensors):
        raise CheckpointError(
            f"{path} is an adapter of litgpt (adapter_v2): it learns a bias and a scale of "
            "lm_head, which adapters have only inside decoder layers here; it would answer "
            "otherwise without them and is not imported"
        )
    raise CheckpointError(
        f"{path} is an adapter of litgpt, whose layout is not read: expected a file of the "
        "authors' code"
    )


def _recognize(path: Path, tensors: dict[str, Tensor]) -> Kind:
    names = list(tensors)
    has_scales = any(re.fullmatch(r"layers\.\d+\..+\.w._scale", name) for name in names)
    has_query = QUERY in tensors
    has_llama = any(name.startswith("llama.layers.") for name in names)
    has_gates = any(re.fullmatch(r"layers\.\d+\.attention\.gate", name) for name in names)
    if has_query and (has_scales or has_gates):
        raise _unknown(path, f"a mixture of V2 multimodal ({QUERY}) and other kinds")
    if has_query and has_llama and PROMPTS in tensors:
        has_lora = any(".lora_" in name for name in names)
        return Kind.V2_LORA_BIAS if has_lora else Kind.V2_BIAS
    if has_scales and not has_llama:
        return Kind.V2_CHAT
    if PROMPTS in tensors and has_gates and not has_llama:
        odd = [n for n in names if n != PROMPTS and not n.endswith(".attention.gate")]
        if odd:
            raise _unknown(path, f"prompts and gates as in V1, but also {odd[0]}")
        return Kind.V1
    found = f"{len(names)} tensors" + (f" such as {', '.join(names[:3])}" if names else "")
    raise _unknown(path, found)


def _check_config(
    path: Path, kind: Kind, config: dict[str, Any], tensors: dict[str, Tensor]
) -> None:
    has_lora = kind is Kind.V2_LORA_BIAS
    if "w_lora" in config and bool(config["w_lora"]) != has_lora:
        raise CheckpointError(
            f"{path}: config says w_lora {config['w_lora']!r:.80}, but the file "
            f"{'has' if has_lora else 'lacks'} LoRA tensors"
        )
    has_bias = any(re.search(r"\.w.\.bias$|\.w._bias$", name) for name in tensors)
    if "w_bias" in config and bool(config["w_bias"]) != has_bias:
        raise CheckpointError(
            f"{path}: config says w_bias {config['w_bias']!r:.80}, but the file "
            f"{'has' if has_bias else 'lacks'} biases"
        )


def _unknown(path: Path, found: str) -> CheckpointError:
    known = "; ".join(f"{kind} has {needs}" for kind, needs in NEEDS.items())
    return CheckpointError(
        f"{path} is not a released LLaMA-Adapter checkpoint: found {found}. Known kinds: {known}"
    )
