"""Which settings of our mechanism a released file is; what the file leaves open and how we fill it.

Open are the number of heads of the projector's blocks (everywhere) and the prompt length (V1 and
chat with prompts). They are taken, in this order, from the caller, from a `meta.json` next to the
file, from what its shapes allow, from the authors' defaults: for prompts with a warning unless the
file has the size of theirs, for heads only if the blocks are as wide as theirs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_adapter.checkpoints.layout import BaseShape
from llama_adapter.checkpoints.released import PROMPTS, QUERY, Kind, Released
from llama_adapter.config import AdapterConfig
from llama_adapter.errors import CheckpointError, ConfigError
from llama_adapter.files import read_json_object

AUTHORS_PROMPT_LENGTH = 10
AUTHORS_PROMPTS = ((300, 4096), (310, 4096))
"""Shapes of the prompts of the released V1 and V2 files: 10 for each of 30 or 31 layers."""

AUTHORS_PROJECTOR_HEADS = 16
AUTHORS_PROJECTOR_WIDTH = 768

CAPTION_INSTRUCTION = "Generate caption of this image"
"""What the released multimodal models were asked with when they learned captions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Overrides:
    """What a released file does not say."""

    prompt_length: int | None = None
    """Prompts per layer."""
    projector_heads: int | None = None
    """Attention heads of the visual projector's blocks."""

    @classmethod
    def next_to(cls, path: Path) -> Overrides:
        """From a `meta.json` next to the file; nothing if it is missing or says neither.

        Raises CheckpointError for one that is damaged or says something impossible.
        """
        meta = path.parent / "meta.json"
        if not meta.exists():
            return cls()
        content = read_json_object(meta, error=CheckpointError)
        visual = content.get("visual")
        if not isinstance(visual, dict | None):
            raise CheckpointError(f"{meta}: visual must be an object, found {visual!r:.80}")
        return cls(
            prompt_length=_positive(content, "adapter_len", meta),
            projector_heads=_positive(visual or {}, "v_num_heads", meta),
        )

    def or_else(self, other: Overrides) -> Overrides:
        """These, and the other's where these say nothing."""
        return Overrides(
            prompt_length=self.prompt_length or other.prompt_length,
            projector_heads=self.projector_heads or other.projector_heads,
        )


def settings(
    released: Released, shape: BaseShape, *, base: str, gate: str, overrides: Overrides
) -> tuple[AdapterConfig, list[str]]:
    """The AdapterConfig of a released file on a base, and warnings about what had to be assumed.

    Raises CheckpointError if the file was made for another depth or its shapes contradict it.
    """
    if gate != "tanh" and released.kind is not Kind.V1:
        raise ConfigError(
            f"{released.path} is {released.kind}: --gate {gate} is for {Kind.V1} files only"
        )
    _check_matrices(released)
    _check_depth(released, shape, base)
    _check_width(released, shape, base)
    warnings: list[str] = []
    if released.kind is Kind.V1:
        length, layers = _static_prompts(released, shape, overrides, warnings)
        values: dict[str, Any] = {"gate": gate, "prompt_length": length, "prompt_layers": layers}
        return AdapterConfig.preset("released-v1", **values), warnings
    if released.kind is Kind.V2_CHAT:
        values = {}
        if PROMPTS in released.tensors:
            length, layers = _static_prompts(released, shape, overrides, warnings)
            values = {"prompt_length": length, "prompt_layers": layers}
        return AdapterConfig.preset("released-v2-chat", **values), warnings
    return _multimodal(released, shape, overrides), warnings


def _multimodal(released: Released, shape: BaseShape, overrides: Overrides) -> AdapterConfig:
    length, width = released.tensors[QUERY].shape
    rows = released.tensors[PROMPTS].shape[0]
    if rows % length or rows // length > shape.num_layers:
        raise CheckpointError(
            f"{released.path}: tensor {PROMPTS} has {rows} rows, expected a multiple of the "
            f"{length} rows of {QUERY} for at most {shape.num_layers} layers"
        )
    pattern = re.compile(r"visual_blocks\.(\d{1,5})\.")
    blocks = {int(match[1]) for name in released.tensors if (match := pattern.match(name))}
    if max(blocks, default=-1) >= len(blocks):
        raise CheckpointError(
            f"{released.path} has visual_blocks.{max(blocks)}, but {len(blocks)} such blocks"
        )
    values: dict[str, Any] = {
        "prompt_length": length,
        "prompt_layers": rows // length,
        "visual_prompt_length": length,
        "projector_width": width,
        "projector_blocks": 1 + max(blocks, default=0),
        "projector_heads": _projector_heads(released, width, overrides),
        "projector_mlp_ratio": _projector_mlp_ratio(released, width),
        "caption_instruction": CAPTION_INSTRUCTION,
        "gate_scale": any(name.endswith(".attention.new_gate") for name in released.tensors),
    }
    if not any(name.endswith(".bias") and ".feed_forward." in name for name in released.tensors):
        values["bias_targets"] = "none"
    if released.kind is Kind.V2_LORA_BIAS:
        values["lora_rank"] = _lora_rank(released)
        return AdapterConfig.preset("released-v2-lora-bias", **values)
    return AdapterConfig.preset("released-v2-bias", **values)


def _check_matrices(released: Released) -> None:
    """What sizes are read from has two axes and a row, or CheckpointError."""
    for name, tensor in released.tensors.items():
        is_read = name in (PROMPTS, QUERY) or name.endswith(
            (".lora_wq_l1.weight", "mlp.fc1.weight")
        )
        if is_read and (tensor.ndim != 2 or 0 in tensor.shape):
            raise CheckpointError(
                f"{released.path}: tensor {name} has shape {list(tensor.shape)}, "
                "expected [rows, width]"
            )
        if name.endswith("attention_norm.weight") and tensor.ndim != 1:
            raise CheckpointError(
                f"{released.path}: tensor {name} has shape {list(tensor.shape)}, expected [width]"
            )


def _check_depth(released: Released, shape: BaseShape, base: str) -> None:
    found, expected = released.num_layers, shape.num_layers
    if found == expected:
        return
    names = [n for n in released.tensors if f"layers.{found - 1}." in n]
    if found > expected:
        raise CheckpointError(
            f"{released.path} has tensor {names[0]}: it was made for {found} layers, "
            f"the base {base} has {expected}"
        )
    lacking = re.sub(r"layers\.\d+\.", f"layers.{expected - 1}.", names[0])
    raise CheckpointError(
        f"{released.path} lacks tensor {lacking}: it has {found} layers, "
        f"the base {base} has {expected}"
    )


def _check_width(released: Released, shape: BaseShape, base: str) -> None:
    sized = (PROMPTS, f"{released.prefix}layers.0.attention_norm.weight")
    for name in sized:
        tensor = released.tensors.get(name)
        if tensor is not None and tensor.shape[-1] != shape.hidden_size:
            raise CheckpointError(
                f"{released.path}: tensor {name} has shape {list(tensor.shape)}, "
                f"expected width {shape.hidden_size} of the base {base}"
            )


def _static_prompts(
    released: Released, shape: BaseShape, overrides: Overrides, warnings: list[str]
) -> tuple[int, int]:
    """Prompt length and number of layers with prompts."""
    prompts = released.tensors[PROMPTS]
    rows, depth = prompts.shape[0], shape.num_layers
    gated = [
        layer for layer in range(depth) if f"layers.{layer}.attention.gate" in released.tensors
    ]
    if not gated:
        raise CheckpointError(f"{released.path} has {PROMPTS} but lacks layers.N.attention.gate")
    at_most = depth - gated[0]
    if overrides.prompt_length is not None:
        length = overrides.prompt_length
    elif at_most < depth:  # gates where prompts are, and only there
        length = rows // at_most
        if rows % at_most:
            raise CheckpointError(
                f"{released.path}: tensor {PROMPTS} has {rows} rows, expected a multiple of the "
                f"{at_most} layers from layers.{gated[0]}.attention.gate up; is a gate missing?"
            )
    else:
        fitting = [rows // n for n in range(depth, 0, -1) if rows % n == 0]
        has_tens = AUTHORS_PROMPT_LENGTH in fitting
        length = AUTHORS_PROMPT_LENGTH if has_tens else fitting[0]
        if len(fitting) > 1 and not (has_tens and tuple(prompts.shape) in AUTHORS_PROMPTS):
            warnings.append(
                f"{released.path} does not say its prompt length: assumed {length} prompts in the "
                f"last {rows // length} layers; --prompt-length overrides it "
                f"({', '.join(map(str, fitting))} fit its {rows} rows)"
            )
    if length < 1 or rows % length or rows // length > depth:
        raise CheckpointError(
            f"{released.path}: tensor {PROMPTS} has {rows} rows, expected a multiple of the "
            f"prompt length {length} for at most {depth} layers"
        )
    return length, rows // length


def _projector_heads(released: Released, width: int, overrides: Overrides) -> int:
    heads = overrides.projector_heads
    if heads is None:
        # no tensor depends on it: a wrong guess would answer wrongly without a sign
        if width != AUTHORS_PROJECTOR_WIDTH:
            divisors = [n for n in range(1, width + 1) if width % n == 0]
            raise CheckpointError(
                f"{released.path} does not say how many heads its visual blocks have; give "
                f"--visual-heads N (divisors of {width}: {', '.join(map(str, divisors))})"
            )
        heads = AUTHORS_PROJECTOR_HEADS
    if width % heads:
        raise CheckpointError(
            f"{released.path}: tensor {QUERY} has width {width}, expected a multiple of "
            f"{heads} heads"
        )
    return heads


def _projector_mlp_ratio(released: Released, width: int) -> float:
    """From the first block's MLP; that of the authors where there is none, which is refused."""
    tensor = released.tensors.get("visual_blocks.0.mlp.fc1.weight")
    return 4.0 if tensor is None else tensor.shape[0] / width


def _lora_rank(released: Released) -> int:
    name = f"{released.prefix}layers.0.attention.lora_wq_l1.weight"
    if name not in released.tensors:
        raise CheckpointError(f"{released.path} lacks tensor {name}")
    rank = released.tensors[name].shape[0]
    stated = (released.file_config or {}).get("lora_rank", rank)
    if stated != rank:
        raise CheckpointError(
            f"{released.path}: tensor {name} has rank {rank}, its config says {stated}"
        )
    return int(rank)


def _positive(content: dict[str, Any], key: str, path: Path) -> int | None:
    """A size, or None; 0 is as good as absent (a chat adapter has no prompts)."""
    value = content.get(key)
    if value is not None and (type(value) is not int or not 0 <= value <= 100_000):
        raise CheckpointError(f"{path}: {key} must be a positive integer, found {value!r:.80}")
    return value or None
