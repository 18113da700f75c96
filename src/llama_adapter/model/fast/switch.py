"""One switch for everything in this package."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_on: ContextVar[bool] = ContextVar("fast", default=True)


@contextmanager
def switched_off() -> Iterator[None]:
    """Within a block the plain code runs, in this thread and what it calls."""
    token = _on.set(False)
    try:
        yield
    finally:
        _on.reset(token)


def is_on() -> bool:
    """Whether fast code may run; under a compiler always, which does not see the switch."""
    return torch.compiler.is_compiling() or _on.get()


def records_gradients(tensor: Tensor) -> bool:
    """Whether a custom backward pass pays: gradients of this tensor are recorded, by autograd.

    A compiler fuses what autograd derives, so it needs none.
    """
    return (
        tensor.requires_grad
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and _on.get()
    )
