"""Which tensor of a released file is which of ours, both ways.

Every entry is a bijection (a renaming, a reordering of rows, a split), so that an imported
adapter can be written back bit for bit and gradients can be compared under the authors' names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llama_adapter.checkpoints.meta_base import rotary_permutation
from llama_adapter.checkpoints.released import PROMPTS, QUERY, Kind
from llama_adapter.config import AdapterConfig

LINEARS = {
    "attention.wq": "attention.q_proj",
    "attention.wk": "attention.k_proj",
    "attention.wv": "attention.v_proj",
    "attention.wo": "attention.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
_BIASED_V2 = ("attention.wq", "attention.wo", "feed_forward.w1", "feed_forward.w2",
              "feed_forward.w3")  # fmt: skip
_ROTATED = ("attention.wq", "attention.wk")


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseShape:
    """What a released file and a base must agree on."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int

    @classmethod
    def of(cls, config: Any) -> BaseShape:
        """The shape that a Hugging Face text config describes."""
        heads = int(config.num_attention_heads)
        return cls(
            hidden_size=int(config.hidden_size),
            intermediate_size=int(config.intermediate_size),
            num_layers=int(config.num_hidden_layers),
            num_heads=heads,
            num_kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        )

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads

    def linear(self, name: str) -> tuple[int, int]:
        """Output and input size of a linear by its name in Meta's layout."""
        kv_size = self.head_size * self.num_kv_heads
        dim, ffn = self.hidden_size, self.intermediate_size
        return {
            "attention.wq": (dim, dim),
            "attention.wk": (kv_size, dim),
            "attention.wv": (kv_size, dim),
            "attention.wo": (dim, dim),
            "feed_forward.w1": (ffn, dim),
            "feed_forward.w2": (dim, ffn),
            "feed_forward.w3": (ffn, dim),
        }[name]


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One tensor of a released file and the tensors of an adapter file that it becomes."""

    official: str
    """The authors' name."""
    ours: tuple[str, ...]
    """Our names; several take equal shares of the rows."""
    shape: tuple[int, ...]
    """Shape in the released file."""
    our_shape: tuple[int, ...]
    """Shape of each of ours."""
    rotary_head_size: int = 0
    """Width of a head if the rows are reordered for rotation, else 0."""

    def to_ours(self, tensor: Tensor) -> dict[str, Tensor]:
        """Our tensors of the released one."""
        if self.rotary_head_size:
            tensor = tensor[rotary_permutation(tensor.shape[0], self.rotary_head_size)]
        shares = tensor.reshape(len(self.ours), *self.our_shape)
        return dict(zip(self.ours, shares.clone(), strict=True))

    def to_official(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The released tensor of ours; the inverse of `to_ours`, also for gradients."""
        tensor = torch.stack([tensors[name] for name in self.ours]).reshape(self.shape)
        if self.rotary_head_size:
            order = rotary_permutation(tensor.shape[0], self.rotary_head_size)
            tensor = tensor[torch.argsort(order)]
        return tensor


def layout(
    kind: Kind, config: AdapterConfig, shape: BaseShape, *, feature_size: int | None = None
) -> list[Entry]:
    """Every tensor that a released file of this kind must have for this configuration."""
    entries = list(_prompt_entries(kind, config, shape))
    entries += _linear_entries(kind, config, shape)
    if kind is not Kind.V1:
        entries += _norm_entries(kind, shape)
    if feature_size is not None:
        entries += _visual_entries(config, shape, feature_size)
    return entries


def _prefix(kind: Kind) -> str:
    return "llama." if kind in (Kind.V2_BIAS, Kind.V2_LORA_BIAS) else ""


def _prompt_entries(kind: Kind, config: AdapterConfig, shape: BaseShape) -> Iterator[Entry]:
    layers = config.prompt_layer_indices(shape.num_layers)
    if not layers:
        return
    length, dim = config.prompt_length, shape.hidden_size
    yield Entry(
        official=PROMPTS,
        ours=tuple(f"layers.{layer}.attention.prompt" for layer in layers),
        shape=(len(layers) * length, dim),
        our_shape=(length, dim),
    )
    for layer in layers:
        ours, official = f"layers.{layer}.attention", f"{_prefix(kind)}layers.{layer}.attention"
        yield Entry(
            official=f"{official}.gate",
            ours=(f"{ours}.gate",),
            shape=(1, shape.num_heads, 1, 1),
            our_shape=(shape.num_heads,),
        )
        if config.gate_scale:
            yield Entry(
                official=f"{official}.new_gate",
                ours=(f"{ours}.gate_scale",),
                shape=(1, 1, 1, 1),
                our_shape=(1,),
            )


def _linear_entries(kind: Kind, config: AdapterConfig, shape: BaseShape) -> Iterator[Entry]:
    for layer in range(shape.num_layers):
        for name, our_name in LINEARS.items():
            out_size, in_size = shape.linear(name)
            block, linear = name.split(".")
            ours, official = f"layers.{layer}.{our_name}", f"{_prefix(kind)}layers.{layer}."
            rotary = shape.head_size if name in _ROTATED else 0
            if kind is Kind.V2_CHAT:
                # the scale multiplies the input, which nothing rotates
                yield _same(f"{official}{name}_bias", f"{ours}.bias", (out_size,), rotary)
                yield _same(f"{official}{name}_scale", f"{ours}.scale", (in_size,))
            elif kind is not Kind.V1 and name in _BIASED_V2 and config.bias_targets != "none":
                yield _same(f"{official}{name}.bias", f"{ours}.bias", (out_size,), rotary)
            if config.lora_rank:
                lora, rank = f"{official}{block}.lora_{linear}", config.lora_rank
                yield _same(f"{lora}_l1.weight", f"{ours}.lora_down", (rank, in_size))
                yield _same(f"{lora}_l2.weight", f"{ours}.lora_up", (out_size, rank), rotary)


def _norm_entries(kind: Kind, shape: BaseShape) -> Iterator[Entry]:
    size = (shape.hidden_size,)
    for layer in range(shape.num_layers):
        official = f"{_prefix(kind)}layers.{layer}."
        for name, ours in (
            ("attention_norm", "input_layernorm"),
            ("ffn_norm", "post_attention_layernorm"),
        ):
            yield _same(f"{official}{name}.weight", f"layers.{layer}.{ours}.weight", size)
    yield _same(f"{_prefix(kind)}norm.weight", "norm.weight", size)


def _visual_entries(config: AdapterConfig, shape: BaseShape, feature_size: int) -> Iterator[Entry]:
    width, dim, root = config.projector_width, shape.hidden_size, "visual.projector"
    mlp_width = config.projector_mlp_width
    yield _same(QUERY, f"{root}.query", (config.visual_prompt_length, width))
    for official, ours, size in (
        ("clip_proj", "feature_proj", (width, feature_size)),
        ("clip_proj_norm", "feature_norm", (width,)),
        ("visual_proj", "proj", (dim, width)),
        ("visual_proj_norm", "norm", (dim,)),
    ):
        yield _same(f"{official}.weight", f"{root}.{ours}.weight", size)
        yield _same(f"{official}.bias", f"{root}.{ours}.bias", size[:1])
    for block in range(config.projector_blocks):
        for official, ours, size in (
            ("norm1", "norm1", (width,)),
            ("attn.qkv", "qkv", (3 * width, width)),
            ("attn.proj", "proj", (width, width)),
            ("norm2", "norm2", (width,)),
            ("mlp.fc1", "fc1", (mlp_width, width)),
            ("mlp.fc2", "fc2", (width, mlp_width)),
        ):
            name, our_name = f"visual_blocks.{block}.{official}", f"{root}.blocks.{block}.{ours}"
            yield _same(f"{name}.weight", f"{our_name}.weight", size)
            yield _same(f"{name}.bias", f"{our_name}.bias", size[:1])


def _same(official: str, ours: str, shape: tuple[int, ...], rotary: int = 0) -> Entry:
    return Entry(
        official=official, ours=(ours,), shape=shape, our_shape=shape, rotary_head_size=rotary
    )
