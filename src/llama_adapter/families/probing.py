"""What adapted attention is given, for discovery and for making prompt keys and values.

The functions of `model.attention_registry` report every call here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from llama_adapter.families.structure import KeysValues


class AttentionObserver(Protocol):
    """Is told of each call of attention in a pass."""

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, visual_prompts: object | None
    ) -> None: ...


class _Reached(BaseException):
    """Ends the run of an attention module where it hands over its keys and values.

    Not an Exception, so that nothing on its way swallows it.
    """

    def __init__(self, keys_values: KeysValues) -> None:
        super().__init__()
        self.keys_values = keys_values


_observer: ContextVar[AttentionObserver | None] = ContextVar("observer", default=None)
_capturing: ContextVar[bool] = ContextVar("capturing", default=False)


_tracing: ContextVar[bool] = ContextVar("tracing", default=False)


def is_tracing() -> bool:
    """Whether this pass is run to see which values come from which, and nothing else."""
    return not torch.compiler.is_compiling() and _tracing.get()


@contextmanager
def tracing_attention() -> Iterator[None]:
    """Inside, attention is computed in a way that records gradients on every device."""
    token = _tracing.set(True)
    try:
        yield
    finally:
        _tracing.reset(token)


@contextmanager
def observing(observer: AttentionObserver) -> Iterator[None]:
    """Inside, the observer is told of each call of adapted attention."""
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


def capture_keys_values(run: Callable[[], Any]) -> KeysValues | None:
    """The first keys and values that `run` hands to adapted attention, where it ends."""
    token = _capturing.set(True)
    try:
        run()
    except _Reached as reached:
        return reached.keys_values
    finally:
        _capturing.reset(token)
    return None


def observe(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, visual_prompts: object | None
) -> None:
    """Called by adapted attention in every pass; does nothing outside of the uses above."""
    if torch.compiler.is_compiling():
        return
    if _capturing.get():
        raise _Reached((key, value))
    observer = _observer.get()
    if observer is not None:
        observer(module, query, key, visual_prompts)
