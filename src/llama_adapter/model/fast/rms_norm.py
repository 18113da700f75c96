"""The backward pass of an RMS norm in few passes over the activations.

Left to itself autograd goes a dozen times over them and keeps two copies; the formula needs the
input alone and half the passes. The forward pass stays the base's own, to the bit.

Shapes: N tokens, d hidden size.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from llama_adapter.model.fast.switch import records_gradients


def rms_epsilon(norm: nn.Module) -> float | None:
    """The ε of a norm that computes `w ⊙ x / √(mean(x²) + ε)`; None if it computes anything else.

    Found by trying: families call their norms alike and differ in what they compute (gemma: 1 + w).
    """
    epsilon = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    names = [name for name, _ in norm.named_parameters()]
    takes_more = len(inspect.signature(type(norm).forward).parameters) != 2  # a gate
    if not isinstance(epsilon, float) or names != ["weight"] or takes_more:
        return None
    trial = copy.deepcopy(norm).to_empty(device="cpu").float()
    weight = cast(Tensor, trial.weight)
    if weight.ndim != 1:
        return None
    # by name: models are also built under another default device, such as meta
    x_d = torch.linspace(-1, 2, weight.shape[0], device="cpu").unsqueeze(0)
    with torch.no_grad():
        weight.copy_(torch.linspace(0.5, 3, weight.shape[0], device="cpu"))
        # the class's function: an instance's may be one that fetches offloaded weights
        found = type(trial).forward(trial, x_d)
        expected = weight * x_d * torch.rsqrt(x_d.square().mean() + epsilon)
    return epsilon if torch.allclose(found, expected, rtol=1e-4, atol=1e-6) else None


def plain_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """`norm(x)` in the dtype of x: an RMS norm multiplies in the wider one of x and its weight."""
    return cast(Tensor, norm(x)).to(x.dtype)


def rms_norm(norm: nn.Module, x: Tensor, *, epsilon: float | None) -> Tensor:
    """The same; where `rms_epsilon` knows the norm's ε, with the backward pass of the formula."""
    if epsilon is not None and records_gradients(cast(Tensor, norm.weight)):
        return cast(Tensor, _RmsNorm.apply(x, norm.weight, norm, epsilon))
    return plain_norm(norm, x)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, norm: nn.Module, epsilon: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.epsilon = epsilon
        return plain_norm(norm, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        x, weight = ctx.saved_tensors
        size, weight_d = x.shape[-1], weight.float()
        x_Nd, grad_Nd = x.float().reshape(-1, size), grad.float().reshape(-1, size)
        with torch.autocast(x.device.type, enabled=False):
            length_N = torch.linalg.vector_norm(x_Nd, dim=-1)
            factor_N = torch.rsqrt(length_N.square() / size + ctx.epsilon)
            product_Nd = grad_Nd * x_Nd
            grad_weight = (product_Nd.T @ factor_N).to(weight.dtype)
            if not ctx.needs_input_grad[0]:
                return None, grad_weight, None, None
            along_N = (product_Nd @ weight_d) * factor_N.square() / size
        # dx = r (w ⊙ g - x r²/d Σ w g x), in the buffer of the product
        grad_x = torch.mul(grad_Nd, weight_d, out=product_Nd)
        grad_x.addcmul_(x_Nd, along_N.unsqueeze(1), value=-1).mul_(factor_N.unsqueeze(1))
        return grad_x.view_as(x).to(x.dtype), grad_weight, None, None
