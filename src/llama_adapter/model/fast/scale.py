"""Bias and scale of a linear in one pass over its output, forward and backward.

Shapes: N tokens, C output features.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llama_adapter.model.fast.switch import is_on, records_gradients


def plain_scale_and_shift(y: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """`s ⊙ (y + b)` in the dtype of y.

    Computed in float32 and rounded once: a bfloat16 scale could not move from 1 by less than 0.004.
    """
    out = y if shift is None else y + shift
    return (out if scale is None else scale * out).to(y.dtype)


def scale_and_shift(y: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """The same in one pass; a backward pass keeps the output alone, which its reader mostly keeps.

    A scale of exactly 0 gets no gradient.
    """
    if scale is None or shift is None or not is_on():
        return plain_scale_and_shift(y, scale, shift)
    if records_gradients(scale):
        return cast(Tensor, _ScaleAndShift.apply(y, scale, shift))
    return _in_one_pass(y, scale, shift)


def _in_one_pass(y: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return torch.addcmul(scale * shift, scale, y).to(y.dtype)


class _ScaleAndShift(torch.autograd.Function):
    """Keeps `out` in place of `y`: `y + b = out / s` gives the gradient of the scale."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        out = _in_one_pass(y, scale, shift)
        ctx.save_for_backward(out, scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        out, scale = ctx.saved_tensors
        size = scale.shape[0]
        grad_NC, out_NC = grad.reshape(-1, size), out.reshape(-1, size)
        scale_C = scale.to(torch.promote_types(grad.dtype, torch.float32))
        by_scale = (grad_NC * out_NC).sum(0, dtype=scale_C.dtype)
        by_shift = grad_NC.sum(0, dtype=scale_C.dtype)
        by_scale = by_scale.div_(scale_C).masked_fill_(scale_C == 0, 0.0).to(scale.dtype)
        by_shift = by_shift.mul_(scale_C).to(scale.dtype)
        grad_y = (grad * scale_C).to(grad.dtype) if ctx.needs_input_grad[0] else None
        return grad_y, by_scale, by_shift
