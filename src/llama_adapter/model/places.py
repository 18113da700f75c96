"""Which absolute places of a sequence a pass covers, and what is said of each.

A pass may be a whole sequence, a piece of one behind cached tokens, or one new token. What is
said token by token (masks, which image each reads) is found by the place in the sequence, never by
counting from the end of a pass.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llama_adapter.errors import ConfigError


def num_cached(cache: Any) -> int:
    """How many tokens of each row a cache holds already."""
    return 0 if cache is None else int(cache.get_seq_length())


def of_this_pass(said_BS: Tensor, *, num_tokens: int, cache: Any, name: str) -> Tensor:
    """What is said of the tokens of a pass, [B, T], from that or from all tokens so far.

    Raises ConfigError where it covers neither.
    """
    if said_BS.shape[1] == num_tokens:
        return said_BS
    before = num_cached(cache)
    if said_BS.shape[1] != before + num_tokens:
        raise ConfigError(
            f"{name} covers {said_BS.shape[1]} tokens, but this pass has {num_tokens} behind "
            f"{before} cached: it must cover those of the pass, or all so far"
        )
    return said_BS[:, before:]


def continued(said_BS: Tensor, *, start: int, stop: int, new: int | bool | None) -> Tensor:
    """What is said of the places from `start` to `stop`, behind the last one `new`.

    Without `new` what was said last goes on.
    """
    known_BT = said_BS[:, start:stop]
    missing = stop - start - known_BT.shape[1]
    if missing == 0:
        return known_BT
    last_B1 = said_BS[:, -1:] if new is None else torch.full_like(said_BS[:, :1], new)
    return torch.cat([known_BT, last_B1.expand(-1, missing)], dim=1)


def positions_of(mask_BS: Tensor, *, num_tokens: int, cache: Any) -> Tensor:
    """Positions [B, T] of the tokens of a pass, counted over what a 2-D mask lets be seen.

    Raises ConfigError where the mask does not cover the cached tokens too.
    """
    position_BS = (mask_BS != 0).long().cumsum(-1).sub_(1).clamp_(min=0)
    if mask_BS.shape[1] == num_tokens and cache is None:
        return position_BS
    if torch.compiler.is_compiling():
        return position_BS[:, -num_tokens:]
    before = num_cached(cache)
    if mask_BS.shape[1] < before + num_tokens:
        raise ConfigError(
            f"attention_mask covers {mask_BS.shape[1]} tokens, but there are {num_tokens} in this "
            f"pass behind {before} cached: it must cover them all"
        )
    return position_BS[:, before : before + num_tokens]
