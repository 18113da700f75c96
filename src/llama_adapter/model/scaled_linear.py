"""Learnable bias and scale on a frozen linear (V2 §4.1), and norms that learn.

Both are wrappers: the frozen module stays inside as `base_layer`, untouched, so that
quantized linears work too and taking the adapter off gives the base back exactly.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from llama_adapter.errors import UnsupportedModelError
from llama_adapter.families.offloading import HOOK, copy_at_home, execution_device, weights_at_hand
from llama_adapter.families.structure import linear_sizes
from llama_adapter.model.fast.rms_norm import rms_epsilon, rms_norm
from llama_adapter.model.fast.scale import plain_scale_and_shift, scale_and_shift
from llama_adapter.model.groups import AdapterModule, Group, Role, Trainable


class ScaledLinear(AdapterModule):
    """`s ⊙ (W x + b₀ + b)`, or with `scale_side="input"` `W (s ⊙ x) + b₀ + b`; plus LoRA if asked.

    New parameters change nothing: s = 1, b = 0, the second LoRA factor 0, exactly.
    Parameters are float32 whatever the base's dtype; the output has the base's dtype.
    """

    group = Group.LANGUAGE
    tensors: ClassVar = {
        "adapter_bias": ("bias", Role.BIAS),
        "scale": ("scale", Role.SCALE),
        "lora_down": ("lora_down", Role.LORA),
        "lora_up": ("lora_up", Role.LORA),
    }
    base_layer: nn.Linear
    """Or a quantized linear, which has the same attributes."""
    adapter_bias: nn.Parameter | None
    scale: nn.Parameter | None
    lora_down: nn.Parameter | None
    lora_up: nn.Parameter | None

    def __init__(
        self,
        base_layer: nn.Module,
        *,
        bias: bool = True,
        scale: bool = True,
        scale_side: str = "output",
        lora_rank: int = 0,
        is_masked: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.base_layer = cast(nn.Linear, base_layer)
        self.in_features, self.out_features = linear_sizes(base_layer)
        self.scale_side = scale_side
        self.is_masked = is_masked
        """Whether zeros come in where a row is padded, which nothing learned may turn into more."""
        device = execution_device(base_layer)
        scale_size = self.out_features if scale_side == "output" else self.in_features
        self.adapter_bias = self.scale = self.lora_down = self.lora_up = None
        if bias:
            self.adapter_bias = nn.Parameter(torch.zeros(self.out_features, device=device))
        if scale:
            self.scale = nn.Parameter(torch.ones(scale_size, device=device))
        if lora_rank:
            # drawn on the CPU, so that a seed gives the same values everywhere
            down = torch.empty(lora_rank, self.in_features)
            nn.init.kaiming_uniform_(down, a=5**0.5, generator=generator)
            self.lora_down = nn.Parameter(down.to(device))
            self.lora_up = nn.Parameter(torch.zeros(self.out_features, lora_rank, device=device))

    @property
    def weight(self) -> Tensor:
        """The frozen weight, for code that asks a linear for its dtype or device."""
        return self.base_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        y, down, up = self.without_lora(x), self.lora_down, self.lora_up
        if down is not None and up is not None:
            y = y + F.linear(F.linear(x.to(down.dtype), down), up).to(y.dtype)
        return y

    def without_lora(self, x: Tensor) -> Tensor:
        """The same linear without LoRA, as prompts see it (released V2)."""
        scale, shift = self.scale, self.adapter_bias
        if self.is_masked and shift is not None:
            on_output = self.scale_side == "output"
            y = self.base_layer(x if on_output else scale_and_shift(x, scale, None))
            kept = shift * (x != 0).any(-1, keepdim=True)
            return plain_scale_and_shift(y, scale if on_output else None, kept)
        if self.scale_side == "input":  # W (s ⊙ x) + b₀ + b
            return scale_and_shift(self.base_layer(scale_and_shift(x, scale, None)), None, shift)
        return scale_and_shift(self.base_layer(x), scale, shift)  # s ⊙ (W x + b₀ + b)

    @torch.no_grad()
    def merged(self) -> MergedLinear | None:
        """The plain linear that this equals; None if the base weight is quantized, or with a bias
        that padding must not get.

        Exact in real arithmetic; in floating point the outputs agree to rounding.
        """
        weight = self.base_layer.weight
        is_masked = self.is_masked and self.adapter_bias is not None
        if type(self.base_layer) not in (nn.Linear, Conv1D) or weight.is_meta or is_masked:
            return None
        return MergedLinear(self, *self.merged_weights())

    @torch.no_grad()
    def merged_weights(self) -> tuple[Tensor, Tensor | None]:
        """Weight [out, in] and bias, in float32, of the single linear that this module equals."""
        with weights_at_hand(self.base_layer):
            weight = self.base_layer.weight.float()
            weight = weight.T if isinstance(self.base_layer, Conv1D) else weight
            bias = None if self.base_layer.bias is None else self.base_layer.bias.float()
        if self.adapter_bias is not None:
            bias = self.adapter_bias.clone() if bias is None else bias + self.adapter_bias
        if self.scale is not None and self.scale_side == "input":
            weight = weight * self.scale
        elif self.scale is not None:
            weight = weight * self.scale[:, None]
            bias = None if bias is None else bias * self.scale
        if self.lora_down is not None and self.lora_up is not None:
            weight = weight + self.lora_up @ self.lora_down
        return weight, bias

    def extra_repr(self) -> str:
        parts = [f"{self.in_features} -> {self.out_features}"]
        parts += [n for n in ("adapter_bias", "scale", "lora_up") if getattr(self, n) is not None]
        return ", ".join(parts)


class MergedLinear(nn.Linear):
    """What replaces a ScaledLinear during inference: an ordinary, frozen linear."""

    def __init__(self, learned: ScaledLinear, weight: Tensor, bias: Tensor | None) -> None:
        dtype = learned.weight.dtype
        super().__init__(
            learned.in_features, learned.out_features, bias=bias is not None, device="meta"
        )
        self.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
        # in a tuple: a reference, not a child whose parameters would count twice
        self._learned = (learned,)

    def without_lora(self, x: Tensor) -> Tensor:
        """As of what it was made of: prompts bypass LoRA, which is merged in here."""
        return self._learned[0].without_lora(x)


class LearnedNorm(AdapterModule):
    """A decoder norm whose weights learn, starting from the base's (V2 §4.1).

    The base's own weights stay as they are; the learned copy is float32.
    """

    group = Group.LANGUAGE

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        if not any(True for _ in base_layer.parameters()):
            raise UnsupportedModelError(f"norm {type(base_layer).__name__} has no weight to learn")
        self.norm = copy_at_home(base_layer).float().requires_grad_(True)
        self.rms_epsilon = rms_epsilon(self.norm)

    def trainables(self) -> Iterator[Trainable]:
        for name, parameter in self.norm.named_parameters():
            yield Trainable(name, parameter, Role.NORM)

    @property
    def weight(self) -> Tensor:
        return cast(Tensor, self.norm.weight)

    def forward(self, x: Tensor, *gate: Any, **options: Any) -> Tensor:
        if isinstance(self.norm, nn.LayerNorm):
            # layer_norm wants input and weights of one dtype
            return self.norm(x.float()).to(x.dtype)
        if gate or options:
            return cast(Tensor, self.norm(x, *gate, **options)).to(x.dtype)
        return rms_norm(self.norm, x, epsilon=self.rms_epsilon)

    @torch.no_grad()
    def merged(self) -> nn.Module | None:
        """The learned norm in the base's dtype.

        An RMS norm becomes torch's own, one call where a family's takes six, unless someone moves
        its input: what accelerate hangs on a module is copied with it.
        """
        dtype = next(self.base_layer.parameters()).dtype
        if self.rms_epsilon is None or hasattr(self.norm, HOOK):
            norm = copy.deepcopy(self.norm)
        else:
            norm = MergedNorm(self.weight.detach().clone(), epsilon=self.rms_epsilon)
        return norm.to(dtype).requires_grad_(False)


class MergedNorm(nn.RMSNorm):
    """What replaces a LearnedNorm during inference, where it is an RMS norm."""

    def __init__(self, weight: Tensor, *, epsilon: float) -> None:
        super().__init__(len(weight), eps=epsilon, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype:
            return super().forward(x)
        # autocast hands half types to float32 weights: torch warns of that
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)
