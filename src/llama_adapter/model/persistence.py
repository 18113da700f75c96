"""Saving and loading adapter directories, strictly.

adapter_config.json          semantics, base and vision references
adapter_model.safetensors    the trained numbers and nothing else
config.json                  a stub that lets the Auto classes find us
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from llama_adapter.errors import CheckpointError, ConfigError
from llama_adapter.model.configuration import LlamaAdapterConfig, read_adapter_config
from llama_adapter.model.offloading import home_of
from llama_adapter.model.references import (
    check_reference,
    load_language_model,
    load_vision,
    resolve_reference,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llama_adapter.model.adapted import LlamaAdapterForConditionalGeneration

ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"
LORA_FOLDER = "lora"
"""Where peft's factors lie in an adapter directory that was trained beside them."""

_IGNORED_LOADING_KEYWORDS = frozenset(
    {"adapter_kwargs", "config", "trust_remote_code", "code_revision", "_commit_hash", "_from_auto",
     "revision", "token", "cache_dir", "force_download", "local_files_only", "subfolder",
     "_from_pipeline", "tp_plan", "torch_dtype"}
)  # fmt: skip
"""What the Auto classes and pipelines pass along and a local adapter directory has no use for."""


class AdapterPersistence:
    """`save_pretrained`, `from_pretrained`, `load_adapter` of the adapted model."""

    def save_pretrained(
        self, save_directory: Any, *, state_dict: dict[str, Tensor] | None = None, **_kwargs: Any
    ) -> None:
        """Write the active adapter; the base and the vision tower are referenced, not copied.

        `state_dict` stands in for the adapter's own, where that is spread over processes.
        """
        model: LlamaAdapterForConditionalGeneration = self  # type: ignore[assignment]
        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        tensors = model.adapter.state_dict() if state_dict is None else state_dict
        state = {name: t.contiguous().cpu() for name, t in tensors.items()}
        temporary = directory / f".{ADAPTER_WEIGHTS_NAME}.tmp"
        save_file(state, temporary, metadata={"format": "pt"})
        temporary.replace(directory / ADAPTER_WEIGHTS_NAME)
        LlamaAdapterConfig(
            adapter=model.adapter_config,
            base=_relative_to(directory, model.config.base),
            vision=_relative_to(directory, model.config.vision),
        ).save_pretrained(directory)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *_model_args: Any,
        language_model: PreTrainedModel | None = None,
        vision: nn.Module | None = None,
        dtype: torch.dtype | str | None = None,
        device_map: Any = None,
        offload_folder: str | Path | None = None,
        quantization_config: Any = None,
        attn_implementation: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """An adapter directory with its base and vision tower, which may be given already loaded.

        Raises CheckpointError for a directory that is damaged or belongs to another base.
        """
        for key in kwargs:
            if key not in _IGNORED_LOADING_KEYWORDS:
                raise ConfigError(f"unknown option {key!r} for loading an adapter")
        dtype = dtype if dtype is not None else kwargs.get("torch_dtype")
        directory = Path(pretrained_model_name_or_path)
        content = read_adapter_config(directory)
        config = LlamaAdapterConfig.from_dict(content)
        assert isinstance(config, LlamaAdapterConfig)
        config.base = _absolute(config.base, directory)
        config.vision = _absolute(config.vision, directory)
        if language_model is None:
            _refuse_lora(directory)
            language_model = load_language_model(
                _reference(config.base, "base", directory),
                dtype=dtype,
                device_map=device_map,
                offload_folder=offload_folder,
                quantization_config=quantization_config,
                attn_implementation=attn_implementation,
            )
        check_reference(language_model, config.base or {}, what="base", source=str(directory))
        if config.vision is not None:
            if vision is None:
                vision = load_vision(
                    _reference(config.vision, "vision tower", directory),
                    device=home_of(language_model.get_input_embeddings()),
                )
            check_reference(vision, config.vision, what="vision tower", source=str(directory))
        model = cls(config, language_model=language_model, vision=vision)  # type: ignore[call-arg]
        path = directory / ADAPTER_WEIGHTS_NAME
        model.adapter.load_state_dict(read_tensors(path), source=str(path))  # type: ignore[attr-defined]
        return model.eval()  # type: ignore[attr-defined]

    def load_adapter(self, directory: Any, adapter_name: str = "default") -> None:
        """Load a further adapter onto the same base; `set_adapter` makes it the active one.

        Raises CheckpointError if it belongs to another base or vision tower.
        """
        model: LlamaAdapterForConditionalGeneration = self  # type: ignore[assignment]
        if adapter_name in model.adapters:
            raise ConfigError(f"an adapter named {adapter_name!r} is loaded already")
        directory = Path(directory)
        _refuse_lora(directory)
        config = LlamaAdapterConfig.from_dict(read_adapter_config(directory))
        assert isinstance(config, LlamaAdapterConfig)
        with model.adapters_disabled():
            check_reference(
                model.language_model, config.base or {}, what="base", source=str(directory)
            )
            if config.vision is not None and model.vision is not None:
                check_reference(
                    model.vision, config.vision, what="vision tower", source=str(directory)
                )
            adapter = model._new_adapter(config.adapter_config)
            try:
                path = directory / ADAPTER_WEIGHTS_NAME
                adapter.load_state_dict(read_tensors(path), source=str(path))
            finally:
                adapter.detach()
        model._adapters[adapter_name] = adapter


def _refuse_lora(directory: Path) -> None:
    """CheckpointError where the adapter was trained beside LoRA, which only its base can hold."""
    if (directory / LORA_FOLDER).is_dir():
        raise CheckpointError(
            f"{directory} was trained beside LoRA in {directory / LORA_FOLDER}: merge that into "
            "the base with peft, and pass the result as language_model="
        )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file; CheckpointError if it is missing or damaged."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def _reference(described: dict[str, Any] | None, what: str, directory: Path) -> str:
    name = (described or {}).get("name_or_path", "")
    if not name:
        raise CheckpointError(
            f"{directory} does not say where its {what} is; pass it already loaded"
        )
    return resolve_reference(name, directory=directory)


def _absolute(described: dict[str, Any] | None, directory: Path) -> dict[str, Any] | None:
    """A reference that also holds when the adapter is saved elsewhere."""
    inside = directory / (described or {}).get("name_or_path", "")
    if described is None or not described.get("name_or_path") or not inside.is_dir():
        return described
    return {**described, "name_or_path": str(inside.resolve())}


def _relative_to(directory: Path, described: dict[str, Any] | None) -> dict[str, Any] | None:
    """A reference to a folder inside the adapter directory, so that the two can move together."""
    path = Path((described or {}).get("name_or_path", ""))
    if described is None or not path.is_absolute() or path == directory.resolve():
        return described
    if not path.is_relative_to(directory.resolve()):
        return described
    return {**described, "name_or_path": path.relative_to(directory.resolve()).as_posix()}
