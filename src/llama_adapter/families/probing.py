"""What adapted attention was given, for the compatibility checks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from llama_adapter.families.projections import KeysValues


class VisualRoute(BaseException):
    """Ends a probing pass at the first attention that carries prompts.

    Not an Exception, so that nothing on its way swallows it.
    """

    def __init__(self, arrived: bool) -> None:
        super().__init__()
        self.arrived = arrived


_probing: ContextVar[bool] = ContextVar("probing", default=False)
_captured: ContextVar[list[KeysValues] | None] = ContextVar("captured", default=None)


def visual_prompts_arrive(run: Callable[[], Any]) -> bool:
    """Whether what `run` gives the model as visual prompts reaches attention."""
    token = _probing.set(True)
    try:
        run()
    except VisualRoute as route:
        return route.arrived
    finally:
        _probing.reset(token)
    return False


@contextmanager
def capture_keys_values() -> Iterator[list[KeysValues]]:
    """Inside, adapted attention records the keys and values it was given."""
    captured: list[KeysValues] = []
    token = _captured.set(captured)
    try:
        yield captured
    finally:
        _captured.reset(token)


def observe(module: nn.Module, key: Tensor, value: Tensor, visual_prompts: object | None) -> None:
    """Called by adapted attention in every pass; does nothing outside the checks."""
    if torch.compiler.is_compiling():
        return
    captured = _captured.get()
    if captured is not None:
        captured.append((key, value))
    if _probing.get() and hasattr(module, "adaption"):
        raise VisualRoute(visual_prompts is not None)
