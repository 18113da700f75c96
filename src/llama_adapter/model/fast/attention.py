"""Attention to a few keys, around the slow lanes of PyTorch's CPU kernel.

Shapes: B batch, E entries of keys (B, or 1 for all rows), T tokens, N = B·T, H heads, D head size,
M keys.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from llama_adapter.model.fast.switch import is_on, records_gradients

FEW_KEYS = 128
"""Up to so many keys, plain products learn faster than the kernel; their weights are small."""

FEW_TOKENS = 4
"""Up to so many queries a pass, PyTorch's attention is the fastest on a CPU too (in float32)."""


def plain_attention(
    query_BHTD: Tensor,
    keys_EHMD: Tensor,
    values_EHMD: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """`softmax(q kᵀ · scale + mask) v` [B, H, T, D]; scale is 1/√D if not given.

    `mask` (bool) is true where a key may be attended to. The softmax is in float32.
    """
    scaled = keys_EHMD * (query_BHTD.shape[-1] ** -0.5 if scale is None else scale)
    scores = query_BHTD @ scaled.transpose(-1, -2)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.float().softmax(-1).to(query_BHTD.dtype) @ values_EHMD


def attention(
    query_BHTD: Tensor,
    keys_EHMD: Tensor,
    values_EHMD: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The same by PyTorch's kernel, or on a CPU by products where its kernel is slow.

    The backward pass of torch's CPU kernel takes four to ten times as long in bfloat16 as plain
    products do (measured with torch 2.13, 67 queries on 16 to 80 keys), in float32 up to three
    times (84 queries on 84 keys, two threads). It is slow with few keys, and so is a softmax along
    so short a dimension: where rows share their keys, products run over a head's tokens of all.
    """
    if not is_on():
        return plain_attention(
            query_BHTD, keys_EHMD, values_EHMD, mask=mask, scale=scale, softcap=softcap
        )
    batch, _, length, _ = query_BHTD.shape
    on_cpu = query_BHTD.device.type == "cpu"
    # for a token or a few, the time goes into the number of calls, not into their work
    if on_cpu and mask is None and len(keys_EHMD) == 1 and batch * length > FEW_TOKENS:
        return _attend_together(query_BHTD, keys_EHMD[0], values_EHMD[0], scale, softcap)
    if softcap is not None or (on_cpu and _prefers_products(query_BHTD, keys_EHMD)):
        return plain_attention(
            query_BHTD, keys_EHMD, values_EHMD, mask=mask, scale=scale, softcap=softcap
        )
    keys, values = keys_EHMD, values_EHMD
    if len(keys) != batch:
        keys, values = keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1)
    return F.scaled_dot_product_attention(query_BHTD, keys, values, attn_mask=mask, scale=scale)


def _attend_together(
    query_BHTD: Tensor,
    keys_HMD: Tensor,
    values_HMD: Tensor,
    scale: float | None,
    softcap: float | None,
) -> Tensor:
    """Attention of all rows to the same keys: one product for a head's tokens."""
    scale = query_BHTD.shape[-1] ** -0.5 if scale is None else scale
    scores_HMN = (keys_HMD * scale) @ _by_head(query_BHTD).transpose(1, 2)
    if softcap is not None:
        scores_HMN = torch.tanh(scores_HMN / softcap) * softcap
    weights_HMN = scores_HMN.float().softmax(1).to(query_BHTD.dtype)
    return _by_row(weights_HMN.transpose(1, 2) @ values_HMD, query_BHTD)


def _by_head(x_BHTD: Tensor) -> Tensor:
    """[H, N, D]; without a copy where a token's heads are adjacent, as projections make them."""
    return x_BHTD.transpose(1, 2).flatten(0, 1).transpose(0, 1)


def _by_row(x_HND: Tensor, like_BHTD: Tensor) -> Tensor:
    """Back to [B, H, T, D]."""
    return x_HND.unflatten(1, (like_BHTD.shape[0], like_BHTD.shape[2])).transpose(0, 1)


def _prefers_products(query: Tensor, key: Tensor) -> bool:
    return not _is_plain_float32(query) or (records_gradients(query) and key.shape[-2] <= FEW_KEYS)


def _is_plain_float32(query: Tensor) -> bool:
    # autocast turns it into a half type by itself
    return query.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
