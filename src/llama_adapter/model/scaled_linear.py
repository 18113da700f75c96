"""Learnable bias and scale on a frozen linear (V2 §4.1), and norms that learn.

Both are wrappers: the frozen module stays inside as `base_layer`, untouched, so that
quantised linears work too and taking the adapter off gives the base back exactly.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llama_adapter.errors import UnsupportedModelError
from llama_adapter.model.groups import AdapterModule, Group


class ScaledLinear(AdapterModule):
    """`s ⊙ (W x + b₀ + b)`, or with `scale_side="input"` `W (s ⊙ x) + b₀ + b`; plus LoRA if asked.

    New parameters change nothing: s = 1, b = 0, the second LoRA factor 0, exactly.
    Parameters are float32 whatever the base's dtype; the output has the base's dtype.
    """

    group = Group.LANGUAGE

    def __init__(
        self,
        base_layer: nn.Module,
        *,
        bias: bool = True,
        scale: bool = True,
        scale_side: str = "output",
        lora_rank: int = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features = int(base_layer.in_features)  # type: ignore[arg-type]
        self.out_features = int(base_layer.out_features)  # type: ignore[arg-type]
        self.scale_side = scale_side
        device = next(base_layer.parameters()).device
        new = {"device": device, "dtype": torch.float32}
        scale_size = self.out_features if scale_side == "output" else self.in_features
        self.bias_shift = nn.Parameter(torch.zeros(self.out_features, **new)) if bias else None
        self.scale = nn.Parameter(torch.ones(scale_size, **new)) if scale else None
        self.lora_down: nn.Parameter | None = None
        self.lora_up: nn.Parameter | None = None
        if lora_rank:
            down = torch.empty(lora_rank, self.in_features, **new)
            nn.init.kaiming_uniform_(down, a=5**0.5, generator=generator)
            self.lora_down = nn.Parameter(down)
            self.lora_up = nn.Parameter(torch.zeros(self.out_features, lora_rank, **new))
        self._folded: tuple[Tensor, Tensor | None] | None = None

    @property
    def weight(self) -> Tensor:
        """The frozen weight, for code that asks a linear for its dtype or device."""
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def is_folded(self) -> bool:
        """Whether `fold` has merged the parameters into one weight and bias."""
        return self._folded is not None

    def forward(self, x: Tensor) -> Tensor:
        if self._folded is not None:
            return F.linear(x, *self._folded)
        y = self.without_lora(x)
        if self.lora_down is not None and self.lora_up is not None:
            low = F.linear(x.to(self.lora_down.dtype), self.lora_down)
            y = y + F.linear(low, self.lora_up).to(y.dtype)
        return y

    def without_lora(self, x: Tensor) -> Tensor:
        """The same linear without LoRA, as prompts see it (released V2)."""
        if self.scale_side == "input" and self.scale is not None:
            y = self.base_layer((x * self.scale).to(x.dtype))
            scale = None
        else:
            y = self.base_layer(x)
            scale = self.scale
        # In float32 and rounded once: a bfloat16 scale could not move from 1 by less than 0.004.
        if scale is None:
            return y if self.bias_shift is None else (y + self.bias_shift).to(y.dtype)
        if self.bias_shift is None:
            return (y * scale).to(y.dtype)
        # one fused pass over the activations
        return torch.addcmul(scale * self.bias_shift, scale, y).to(y.dtype)

    @torch.no_grad()
    def fold(self) -> bool:
        """Merge into one weight and bias; False if the base weight is quantised and cannot be.

        Exact in real arithmetic; in floating point the outputs agree to rounding.
        """
        weight = self.base_layer.weight
        if type(self.base_layer) is not nn.Linear or not weight.is_floating_point():
            return False
        merged, bias = self.folded_weights()
        self._folded = (
            merged.to(weight.dtype),
            None if bias is None else bias.to(weight.dtype),
        )
        return True

    @torch.no_grad()
    def folded_weights(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias, in float32, of the single linear that this module equals."""
        weight = self.base_layer.weight.float()  # type: ignore[operator]
        bias = self.base_layer.bias
        if bias is not None:
            bias = bias.float()  # type: ignore[operator]
        if self.bias_shift is not None:
            bias = self.bias_shift if bias is None else bias + self.bias_shift
        if self.scale is not None and self.scale_side == "input":
            weight = weight * self.scale
        elif self.scale is not None:
            weight = weight * self.scale[:, None]
            bias = None if bias is None else bias * self.scale
        if self.lora_down is not None and self.lora_up is not None:
            weight = weight + self.lora_up @ self.lora_down
        return weight, None if bias is None else bias.detach().clone()

    def unfold(self) -> None:
        """Undo `fold`."""
        self._folded = None

    def extra_repr(self) -> str:
        parts = [f"{self.in_features} -> {self.out_features}"]
        parts += [n for n in ("bias_shift", "scale", "lora_up") if getattr(self, n) is not None]
        return ", ".join(parts)


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
        self.norm = copy.deepcopy(base_layer).float().requires_grad_(True)

    @property
    def weight(self) -> Tensor:
        return self.norm.weight  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.norm, nn.LayerNorm):
            # layer_norm wants input and weights of one dtype
            return self.norm(x.float()).to(x.dtype)  # type: ignore[no-any-return]
        # an RMS norm multiplies in the wider dtype; going back rounds as the base would
        return self.norm(x).to(x.dtype)  # type: ignore[no-any-return]
