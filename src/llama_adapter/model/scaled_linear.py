"""Learnable bias and scale on a frozen linear (V2 §4.1), and norms that learn.

Both are wrappers: the frozen module stays inside as `base_layer`, untouched, so that
quantised linears work too and taking the adapter off gives the base back exactly.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from llama_adapter.errors import UnsupportedModelError
from llama_adapter.model.groups import AdapterModule, Group
from llama_adapter.model.learning import learns
from llama_adapter.model.offloading import HOOK, copy_at_home, home_of, numbers_at_hand
from llama_adapter.model.rms_norm import rms_epsilon, rms_norm


class ScaledLinear(AdapterModule):
    """`s ⊙ (W x + b₀ + b)`, or with `scale_side="input"` `W (s ⊙ x) + b₀ + b`; plus LoRA if asked.

    New parameters change nothing: s = 1, b = 0, the second LoRA factor 0, exactly.
    Parameters are float32 whatever the base's dtype; the output has the base's dtype.
    """

    group = Group.LANGUAGE
    base_layer: nn.Linear
    """Or a quantised linear, which has the same attributes."""
    bias_shift: nn.Parameter | None
    scale: nn.Parameter | None
    lora_down: nn.Parameter | None
    lora_up: nn.Parameter | None

    def __init__(
        self,
        base_layer: nn.Linear,
        *,
        bias: bool = True,
        scale: bool = True,
        scale_side: str = "output",
        lora_rank: int = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features = int(base_layer.in_features)
        self.out_features = int(base_layer.out_features)
        self.scale_side = scale_side
        device = home_of(base_layer)
        scale_size = self.out_features if scale_side == "output" else self.in_features
        self.bias_shift = self.scale = self.lora_down = self.lora_up = None
        if bias:
            self.bias_shift = nn.Parameter(torch.zeros(self.out_features, device=device))
        if scale:
            self.scale = nn.Parameter(torch.ones(scale_size, device=device))
        if lora_rank:
            # drawn on the CPU, so that a seed gives the same numbers everywhere
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
        # by name once: a module looks its parameters up in Python
        base_layer, scale, shift = self.base_layer, self.scale, self.bias_shift
        if scale is None or self.scale_side == "input":
            y = base_layer(x if scale is None else (x * scale).to(x.dtype))
            # In float32 and rounded once, here and below: a bfloat16 scale could not move from 1
            # by less than 0.004.
            return y if shift is None else (y + shift).to(y.dtype)
        if shift is None:
            y = base_layer(x)
            return (y * scale).to(y.dtype)
        if learns(scale) and x.requires_grad and _is_plain(base_layer):
            weight, bias = base_layer.weight, base_layer.bias
            return cast(Tensor, _ScaledLinear.apply(x, weight, bias, scale, shift))
        y = base_layer(x)
        # whoever hooks the frozen linear may keep its output, whose place would be taken
        if learns(scale) and y.requires_grad and not base_layer._forward_hooks:
            return cast(Tensor, _ScaledLinear.apply(y, None, None, scale, shift))
        return _scaled_and_shifted(y, scale, shift)

    @torch.no_grad()
    def folded(self) -> FoldedLinear | None:
        """The plain linear that this equals; None if the base weight is quantised.

        Exact in real arithmetic; in floating point the outputs agree to rounding.
        """
        weight = self.base_layer.weight
        if type(self.base_layer) is not nn.Linear or weight.is_meta:
            return None
        return FoldedLinear(self, *self.folded_weights())

    @torch.no_grad()
    def folded_weights(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias, in float32, of the single linear that this module equals."""
        with numbers_at_hand(self.base_layer):
            weight = self.base_layer.weight.float()
            bias = None if self.base_layer.bias is None else self.base_layer.bias.float()
        if self.bias_shift is not None:
            bias = self.bias_shift.clone() if bias is None else bias + self.bias_shift
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
        parts += [n for n in ("bias_shift", "scale", "lora_up") if getattr(self, n) is not None]
        return ", ".join(parts)


def _scaled_and_shifted(y: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    # one fused pass over the activations
    return torch.addcmul(scale * shift, scale, y).to(y.dtype)


def _is_plain(linear: nn.Linear) -> bool:
    """Whether the linear is its product and no more: nothing watches, moves or learns its parts."""
    if type(linear) is not nn.Linear or "forward" in linear.__dict__:
        return False
    weight = linear.weight
    # a weight of another class may be quantised, or a shard, and know one product alone
    parts = [weight] if linear.bias is None else [weight, linear.bias]
    if any(type(part) is not nn.Parameter or part.requires_grad for part in parts):
        return False
    watched = (
        linear._forward_pre_hooks
        or linear._forward_hooks
        or linear._backward_pre_hooks
        or linear._backward_hooks
    )
    kind = weight.device.type
    casts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return not watched and not casts


class _ScaledLinear(torch.autograd.Function):
    """`s ⊙ (y + b)` with y = W x + b₀, or the given y if there is no weight.

    Keeps its output for the backward pass, not `y`, whose place it takes. What follows a linear
    mostly keeps that output too, so it costs no memory; and `y + b = out / s` gives the gradient of
    the scale. A scale of exactly 0 gets none.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        scale: Tensor,
        shift: Tensor,
    ) -> Tensor:
        y = x if weight is None else F.linear(x, weight, bias)
        # a linear with a bias returns a view, which autograd would copy; whoever takes part in
        # every operation, such as selective checkpointing, may keep what it has seen
        if y._base is None and not torch._C._len_torch_dispatch_stack():
            out = torch.addcmul(scale * shift, scale, y, out=y)
            if weight is None:
                ctx.mark_dirty(y)
        else:
            out = _scaled_and_shifted(y, scale, shift)
        # detached: a leaf would be whatever the module has by then
        ctx.save_for_backward(out, scale, None if weight is None else weight.detach())
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        out, scale, weight = ctx.saved_tensors
        size = scale.shape[0]
        grad_NC, out_NC = grad.reshape(-1, size), out.reshape(-1, size)
        scale_C = scale.to(torch.promote_types(grad.dtype, torch.float32))
        by_scale, by_shift = _summed_over_tokens(grad_NC, out_NC, scale_C)
        by_scale = by_scale.div_(scale_C).masked_fill_(scale_C == 0, 0.0).to(scale.dtype)
        by_shift = by_shift.mul_(scale_C).to(scale.dtype)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad * scale_C).to(grad.dtype)
            grad_x = grad_x if weight is None else grad_x @ weight
        return grad_x, None, None, by_scale, by_shift


def _summed_over_tokens(grad_NC: Tensor, out_NC: Tensor, scale_C: Tensor) -> tuple[Tensor, Tensor]:
    """Σ grad ⊙ out and Σ grad, in the dtype of the scale."""
    if grad_NC.device.type == "cpu" and len(grad_NC):
        zero_C, one_C = torch.zeros_like(scale_C), torch.ones_like(scale_C)
        # a batch norm with fixed statistics has these gradients; in one pass over activations
        _, by_scale, by_shift = torch.ops.aten.native_batch_norm_backward(
            grad_NC, out_NC, scale_C, zero_C, one_C, None, None, False, 0.0, [False, True, True]
        )
        return by_scale, by_shift
    by_scale = (grad_NC * out_NC).sum(0, dtype=scale_C.dtype)
    return by_scale, grad_NC.sum(0, dtype=scale_C.dtype)


class FoldedLinear(nn.Linear):
    """What stands in for a ScaledLinear during inference: an ordinary, frozen linear."""

    def __init__(self, learned: ScaledLinear, weight: Tensor, bias: Tensor | None) -> None:
        dtype = learned.weight.dtype
        super().__init__(
            learned.in_features, learned.out_features, bias=bias is not None, device="meta"
        )
        self.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
        # in a tuple: a reference, not a child whose numbers would count twice
        self._learned = (learned,)

    @property
    def learned(self) -> ScaledLinear:
        """What it was made of: prompts bypass LoRA, which is folded in here."""
        return self._learned[0]


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

    @property
    def weight(self) -> Tensor:
        return cast(Tensor, self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.norm, nn.LayerNorm):
            # layer_norm wants input and weights of one dtype
            return self.norm(x.float()).to(x.dtype)
        if self.rms_epsilon is not None and learns(self.weight):
            return rms_norm(x, self.norm, self.rms_epsilon)
        # an RMS norm multiplies in the wider dtype; going back rounds as the base would
        return cast(Tensor, self.norm(x)).to(x.dtype)

    @torch.no_grad()
    def folded(self) -> nn.Module | None:
        """The learned norm in the base's dtype.

        An RMS norm becomes torch's own, one call where a family's takes six, unless someone moves
        its input: what accelerate hangs on a module is copied with it.
        """
        dtype = next(self.base_layer.parameters()).dtype
        if self.rms_epsilon is None or hasattr(self.norm, HOOK):
            norm = copy.deepcopy(self.norm)
        else:
            norm = FoldedNorm(self.weight.detach().clone(), epsilon=self.rms_epsilon)
        return norm.to(dtype).requires_grad_(False)


class FoldedNorm(nn.RMSNorm):
    """What stands in for a LearnedNorm during inference, where it is an RMS norm."""

    def __init__(self, weight: Tensor, *, epsilon: float) -> None:
        super().__init__(len(weight), eps=epsilon, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype:
            return super().forward(x)
        # autocast hands half types to float32 weights: torch warns of that
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)
