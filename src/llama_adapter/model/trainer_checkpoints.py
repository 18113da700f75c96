"""Checkpoints that Hugging Face's Trainer resumes from, and picks the best of.

Trainer knows peft's adapters by their class and reads everything else from `model.safetensors`
with `load_state_dict`. So in a folder of its checkpoints the adapter's file has that name too,
and `load_state_dict` takes an adapter's tensors.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.nn.modules.module import _IncompatibleKeys
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_NAME

from llama_adapter.model.persistence import ADAPTER_WEIGHTS_NAME, AdapterPersistence

if TYPE_CHECKING:
    from llama_adapter.model.modeling import LlamaAdapterForConditionalGeneration

_CHECKPOINT = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-\d+")


class TrainerCheckpoints(AdapterPersistence):
    """`save_pretrained` and `load_state_dict` as Hugging Face's Trainer calls them."""

    def _after_saving(self, directory: Path) -> None:
        if _CHECKPOINT.fullmatch(directory.name):
            _name_too(directory / ADAPTER_WEIGHTS_NAME, directory / SAFE_WEIGHTS_NAME)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load the tensors of an adapter's file, strictly, or the whole model's as in torch.

        Raises CheckpointError where an adapter's tensors do not fit the active one.
        """
        model: LlamaAdapterForConditionalGeneration = self  # type: ignore[assignment]
        if _is_adapter(state_dict, model):
            model.adapter.load_state_dict(dict(state_dict), source="the adapter's state")
            return _IncompatibleKeys([], [])
        return super().load_state_dict(state_dict, strict=strict, assign=assign)  # type: ignore[misc]


def _is_adapter(state: Mapping[str, Any], model: LlamaAdapterForConditionalGeneration) -> bool:
    """Whether tensors are those of an adapter's file, rather than a model's or a part of one."""
    has_base = any(name.startswith("language_model.") for name in state)
    return not has_base and not state.keys() <= model.state_dict().keys()


def _name_too(path: Path, name: Path) -> None:
    """Give a file a second name; a copy where a file system knows no links."""
    name.unlink(missing_ok=True)
    try:
        os.link(path, name)
    except OSError:
        shutil.copyfile(path, name)
