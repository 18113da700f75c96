"""Attention that does not fall into the slow lanes of PyTorch's CPU kernel.

Shapes: B batch, T tokens, N = B·T, H heads, D head size, M keys.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from llama_adapter.model.learning import learns

FEW_KEYS = 128
"""Up to so many keys, plain products learn faster than the kernel; their weights are small."""


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Torch's function of that name; on a CPU half types and short learners use plain products.

    The backward pass of torch's CPU kernel takes four to ten times as long in bfloat16 as plain
    products do (measured with torch 2.13, 67 queries on 16 to 80 keys), in float32 up to three
    times (84 queries on 84 keys, two threads).
    """
    if query.device.type != "cpu" or not _prefers_products(query, key):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    # the keys are the fewer
    scaled = key * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = query @ scaled.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.float().softmax(-1).to(query.dtype) @ value


def attend_together(
    query_BHTD: Tensor,
    keys_HMD: Tensor,
    values_HMD: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """Attention [B, H, T, D] of all rows to the same few keys: one product for a head's tokens.

    Torch's kernel is slow with so few keys, and its softmax along so short a dimension.
    """
    if softcap is None and _is_plain_float32(query_BHTD) and learns(query_BHTD):
        return cast(Tensor, _AttendTogether.apply(query_BHTD, keys_HMD, values_HMD, scale))
    scores_HMN = (keys_HMD * scale) @ _by_head(query_BHTD).transpose(1, 2)
    if softcap is not None:
        scores_HMN = torch.tanh(scores_HMN / softcap) * softcap
    weights_HMN = scores_HMN.float().softmax(1).to(query_BHTD.dtype)
    return _by_row(weights_HMN.transpose(1, 2) @ values_HMD, query_BHTD)


class _AttendTogether(torch.autograd.Function):
    """The same, with a backward pass whose products read and write the layouts they are given."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, keys_HMD: Tensor, values_HMD: Tensor, scale: float) -> Any:
        scaled_HMD, query_HND = keys_HMD * scale, _by_head(query)
        weights_HMN = (scaled_HMD @ query_HND.transpose(1, 2)).softmax(1)
        ctx.save_for_backward(query, scaled_HMD, values_HMD, weights_HMN)
        ctx.scale = scale
        return _by_row(weights_HMN.transpose(1, 2) @ values_HMD, query)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, scaled_HMD, values_HMD, weights_HMN = ctx.saved_tensors
        grad_query = grad_keys = grad_values = None
        query_HND, grad_HND = _by_head(query), _by_head(grad)
        grad_scores = torch.ops.aten._softmax_backward_data(
            values_HMD @ grad_HND.transpose(1, 2), weights_HMN, 1, weights_HMN.dtype
        )
        if ctx.needs_input_grad[0]:
            grad_query = _by_row(grad_scores.transpose(1, 2) @ scaled_HMD, query)
        if ctx.needs_input_grad[1]:
            grad_keys = (grad_scores @ query_HND).mul_(ctx.scale)
        if ctx.needs_input_grad[2]:
            grad_values = weights_HMN @ grad_HND
        return grad_query, grad_keys, grad_values, None


def _by_head(x_BHTD: Tensor) -> Tensor:
    """[H, N, D]; without a copy where a token's heads lie together, as projections make them."""
    return x_BHTD.transpose(1, 2).flatten(0, 1).transpose(0, 1)


def _by_row(x_HND: Tensor, like_BHTD: Tensor) -> Tensor:
    """Back to [B, H, T, D]."""
    return x_HND.unflatten(1, (like_BHTD.shape[0], like_BHTD.shape[2])).transpose(0, 1)


def _prefers_products(query: Tensor, key: Tensor) -> bool:
    return not _is_plain_float32(query) or (learns(query) and key.shape[-2] <= FEW_KEYS)


def _is_plain_float32(query: Tensor) -> bool:
    # autocast turns it into a half type by itself
    return query.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
