"""Modules whose numbers accelerate keeps elsewhere until they are needed.

Under a `device_map` a frozen module may hold its numbers on the meta device, and a hook fetches
them from memory or disk for each pass. What learns never does: it lives where its module computes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from llama_adapter.families.structure import Attention

HOOK = "_hf_hook"
_ADDED = (HOOK, "_old_forward", "forward")
"""What accelerate hangs on a module that it moves."""


def execution_device(module: nn.Module | Attention) -> torch.device:
    """Where a module computes: with offloading its own numbers may be elsewhere until then."""
    for part in module.modules():
        for hook in _hooks(part):
            device = getattr(hook, "execution_device", None)
            if device is not None:
                return torch.device(device)
    return next(module.parameters()).device


@contextmanager
def weights_at_hand(module: nn.Module, *, recurse: bool = True) -> Iterator[None]:
    """Inside, the numbers of a module and its parts are where it computes, fetched if need be."""
    with ExitStack() as fetched:
        for part in module.modules() if recurse else (module,):
            hook: Any = getattr(part, HOOK, None)
            if hook is not None:
                hook.pre_forward(part)
                fetched.callback(hook.post_forward, part, None)
        yield


def copy_at_home(module: nn.Module) -> nn.Module:
    """A copy that keeps its numbers, where the module computes; inputs still come to it there."""
    parts = list(module.modules())
    hooks = [hook for part in parts for hook in _hooks(part)]
    outer: list[Any] = [getattr(part, HOOK) for part in parts if hasattr(part, HOOK)]
    if not any(getattr(hook, "offload", False) for hook in hooks):
        # a hook knows numbers of the whole model: it is shared, not copied
        return copy.deepcopy(module, {id(hook): hook for hook in outer})
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    with weights_at_hand(module):
        copied = copy.deepcopy(module, {id(hook): None for hook in outer})
    for part in copied.modules():
        if HOOK in part.__dict__:
            for name in _ADDED:
                part.__dict__.pop(name, None)
    goes_back = any(getattr(hook, "io_same_device", False) for hook in hooks)
    moving = AlignDevicesHook(execution_device(module), io_same_device=goes_back)
    home: nn.Module = add_hook_to_module(copied, moving)
    return home


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    hook: Any = getattr(module, HOOK, None)
    if hook is None:
        return ()
    return tuple(getattr(hook, "hooks", (hook,)))
