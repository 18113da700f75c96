"""Our attention functions in transformers' public registry, next to the base's own.

Each runs the base's function unchanged and adds what the module's `adaption` child says.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llama_adapter.errors import UnsupportedModelError
from llama_adapter.families.probing import is_tracing, observe
from llama_adapter.model.routing import VisualPrompts

PAGED = frozenset({"block_table", "read_index"})
"""What only continuous batching gives attention: its one long row has no mask of ours."""

PREFIX = "llama_adapter_"
"""Registered names are this plus transformers' own, so `flash` and `sdpa` stay recognizable."""

IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention", "flash_attention_2")


_around: ContextVar[VisualPrompts | None] = ContextVar("around", default=None)


@contextmanager
def visual_context(visual: VisualPrompts | None) -> Iterator[None]:
    """Inside, attention reads visual prompts that its decoder does not hand on."""
    token = _around.set(visual)
    try:
        yield
    finally:
        _around.reset(token)


def same_visual_context() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For checkpointing: the visual prompts of this pass when it is computed again."""
    return nullcontext(), visual_context(_around.get())


def _eager_of(module: nn.Module) -> Callable[..., Any]:
    for cls in type(module).__mro__:
        function = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if function is not None:
            found: Callable[..., Any] = function
            return found
    raise UnsupportedModelError(f"no eager attention function next to {type(module).__name__}")


def _adapted_attention(implementation: str) -> Callable[..., Any]:
    def attention_forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        *args: Any,
        visual_prompts: VisualPrompts | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if not PAGED.isdisjoint(kwargs):
            raise UnsupportedModelError(
                "an adapted model cannot run transformers' continuous batching; "
                "give generate() a padded batch instead"
            )
        observe(module, query, key, value, visual_prompts)
        if implementation == "flex_attention" and is_tracing():
            base, attention_mask = _eager_of(module), None  # it has no backward pass on a CPU
        elif implementation == "eager":
            base = _eager_of(module)
        else:
            base = ALL_ATTENTION_FUNCTIONS[implementation]
        added, adaption = None, getattr(module, "adaption", None)
        if adaption is not None:
            if visual_prompts is None and not torch.compiler.is_compiling():
                visual_prompts = _around.get()
            scaling = kwargs.get("scaling")
            if scaling is None:
                scaling = getattr(module, "scaling", None) or query.shape[-1] ** -0.5
            # first, while a CPU still has at hand the weights that made keys and values
            added = adaption(
                module, query, visual_prompts, scaling=scaling, softcap=kwargs.get("softcap")
            )
        output, weights = base(module, query, key, value, attention_mask, *args, **kwargs)
        return (output if added is None else output + added), weights

    attention_forward.__name__ = PREFIX + implementation
    return attention_forward


def register_attention() -> None:
    """Register our attention next to transformers' own, masks included.

    Without the mask entry a model would silently run with no mask at all.
    """
    for implementation in IMPLEMENTATIONS:
        AttentionInterface.register(PREFIX + implementation, _adapted_attention(implementation))
        AttentionMaskInterface.register(
            PREFIX + implementation, ALL_MASK_ATTENTION_FUNCTIONS[implementation]
        )
