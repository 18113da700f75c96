"""The Hugging Face configuration of an adapted model, stored as `adapter_config.json`.

`config.json` next to it is a stub with the model type, for the Auto classes; the settings are in
one place only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from llama_adapter.config import (
    FORMAT_VERSION,
    NEWER,
    AdapterConfig,
    as_version_1,
    from_version_1,
    shown,
)
from llama_adapter.errors import CheckpointError, ConfigError
from llama_adapter.files import can_be_path, read_json_object, write_atomically
from llama_adapter.model.fingerprints import check_form
from llama_adapter.model.hub import HUB_OPTIONS, adapter_folder, hub_options

ADAPTER_CONFIG_NAME = "adapter_config.json"
_FIELDS = ("adapter", "base", "vision")
_PROCESSOR = "processor"
"""What `processing.agreement` records of the processor next to it."""
OF_THE_BASE = frozenset(
    {"vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
     "head_dim", "intermediate_size", "max_position_embeddings"}
)  # fmt: skip
"""Attributes that an adapted model's config has from its base, once the model is built."""
_REFERENCE: dict[str, tuple[type, ...]] = {
    "name_or_path": (str,),
    "revision": (str, type(None)),
    "model_type": (str,),
    "hidden_size": (int,),
    "num_hidden_layers": (int,),
    "fingerprint": (str, type(None)),
}
"""What a reference to a base or encoder holds."""
_PEFT = "peft"
"""The key that a reference to a base has in addition where peft has put something on the base."""
_NEWER = ("weights", "config")
"""What references of version 0.1 do not have; later ones have both."""


class LlamaAdapterConfig(PreTrainedConfig):
    """What the adapter computes and which base and vision encoder it belongs to.

    `adapter` is an AdapterConfig as a dictionary; `base` and `vision` are references:
    `name_or_path` (a name, a path, or a path relative to the adapter directory),
    `revision`, `fingerprint` and shape of the model that the adapter was trained on.
    """

    model_type = "llama_adapter"

    def __init__(
        self,
        adapter: dict[str, Any] | AdapterConfig | None = None,
        base: dict[str, Any] | None = None,
        vision: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if adapter is None:
            adapter = AdapterConfig()
        elif not isinstance(adapter, AdapterConfig):
            adapter = AdapterConfig.from_dict(adapter)
        self.adapter = adapter.to_dict()
        self.base = base
        self.vision = vision
        self._text_config: PreTrainedConfig | None = None
        super().__init__(**kwargs)

    @property
    def adapter_config(self) -> AdapterConfig:
        """The adapter's settings as a checked value."""
        return AdapterConfig.from_dict(self.adapter)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> LlamaAdapterConfig:
        """A published setting by name, with changes; ConfigError for an unknown name or key."""
        return cls(adapter=AdapterConfig.preset(name, **overrides))

    def bind_text_config(self, text_config: PreTrainedConfig) -> None:
        """Let generation and caches see the base's shapes; never stored."""
        self._text_config = text_config

    def get_text_config(self, *_args: Any, **_kwargs: Any) -> PreTrainedConfig:
        return self if self._text_config is None else self._text_config

    def __getattr__(self, name: str) -> Any:
        # shapes that trainers ask a model's config for are those of the base
        text_config = self.__dict__.get("_text_config")
        if name in OF_THE_BASE and text_config is not None:
            return getattr(text_config, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def to_dict(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in _FIELDS}
        return {"model_type": self.model_type, "format_version": FORMAT_VERSION, **values}

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()

    def save_pretrained(self, save_directory: Any, *_args: Any, **_kwargs: Any) -> None:
        """Write `adapter_config.json` and the stub `config.json`."""
        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        stub = {
            "model_type": self.model_type,
            "architectures": ["LlamaAdapterForConditionalGeneration"],
        }
        ours = {**self.to_dict(), **_processor_of(directory)}
        for name, content in ((ADAPTER_CONFIG_NAME, ours), ("config.json", stub)):
            write_atomically(directory / name, json.dumps(content, indent=2) + "\n")

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read an adapter directory; CheckpointError says what is wrong with it."""
        options = hub_options(kwargs)
        rest = {name: value for name, value in kwargs.items() if name not in HUB_OPTIONS}
        return read_adapter_config(
            adapter_folder(str(pretrained_model_name_or_path), **options)
        ), rest

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], **kwargs: Any
    ) -> LlamaAdapterConfig | tuple[LlamaAdapterConfig, dict[str, Any]]:
        return_unused = kwargs.pop("return_unused_kwargs", False)
        where = kwargs.pop("name_or_path", None)
        if where is not None and "adapter" not in config_dict:
            # AutoConfig read the stub next to it
            revision = config_dict.get("_commit_hash")
            config_dict = read_adapter_config(adapter_folder(str(where), revision=revision))
        config = cls(**{name: config_dict.get(name) for name in _FIELDS})
        return (config, kwargs) if return_unused else config


def read_adapter_config(directory: Path) -> dict[str, Any]:
    """The checked content of `adapter_config.json` in an adapter directory.

    `adapter` has the names of version 2, whichever version the file has.
    """
    path = directory / ADAPTER_CONFIG_NAME
    if not path.is_file():
        hint = ""
        if (directory / "adapter" / ADAPTER_CONFIG_NAME).is_file():
            hint = f" (a run? its adapter is {directory / 'adapter'})"
        elif (directory / "config.json").is_file():
            hint = " (a base or an encoder? adapters are put on one by training)"
        raise CheckpointError(
            f"{directory} is not an adapter directory: {ADAPTER_CONFIG_NAME} is missing{hint}"
        )
    content = read_json_object(path, error=CheckpointError)
    if "peft_type" in content:
        raise CheckpointError(
            f"{directory} is an adapter directory of peft ({shown(content['peft_type'])}), which "
            "does not describe a llama_adapter model: give it as the base to train or run on it"
        )
    if content.get("model_type") != LlamaAdapterConfig.model_type:
        raise CheckpointError(
            f"{path} does not describe a llama_adapter model "
            "(is this an adapter of another library?)"
        )
    version = content.get("format_version")
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {shown(version)}, this package reads 1 to {FORMAT_VERSION}"
        )
    unknown = sorted(set(content) - {*_FIELDS, _PROCESSOR, "model_type", "format_version"})
    if unknown:
        raise CheckpointError(f"{path} has unknown keys {shown(unknown)}")
    # every key is written, so one that is not there is damage and no default
    _refuse_missing(content, _FIELDS, where=str(path))
    for name in _FIELDS:
        found = content.get(name)
        if not isinstance(found, dict) and (found is not None or name == "adapter"):
            raise CheckpointError(f"{path}: {name} must be an object, got {shown(found)}")
    if version == 1:
        content["adapter"] = from_version_1(content["adapter"])
    try:
        known = AdapterConfig.from_dict(content["adapter"]).to_dict()
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
    _refuse_missing(content["adapter"], sorted(known.keys() - NEWER), where=f"{path}: adapter")
    for name in ("base", "vision"):
        if content[name] is not None:
            _check_reference(content[name], where=f"{path}: {name}")
    return content


def _processor_of(directory: Path) -> dict[str, Any]:
    """The record of the processor that is in a directory already; saving keeps it."""
    if not (directory / ADAPTER_CONFIG_NAME).is_file():
        return {}
    try:
        content = read_json_object(directory / ADAPTER_CONFIG_NAME, error=CheckpointError)
    except CheckpointError:  # what is damaged is replaced
        return {}
    return {_PROCESSOR: content[_PROCESSOR]} if _PROCESSOR in content else {}


def _refuse_missing(content: Mapping[str, Any], keys: Iterable[str], *, where: str) -> None:
    missing = [key for key in keys if key not in content]
    if missing:
        raise CheckpointError(f"{where} lacks {', '.join(missing)}")


def _check_reference(reference: Mapping[str, Any], *, where: str) -> None:
    _refuse_missing(reference, _REFERENCE, where=where)
    if any(key in reference for key in _NEWER):
        _refuse_missing(reference, _NEWER, where=where)
    for key in _NEWER:
        value = reference.get(key)
        if not isinstance(value, dict | None):
            raise CheckpointError(f"{where}.{key} must be an object, got {shown(value)}")
        if value is not None and key == "weights":
            check_form(value, where=f"{where}.{key}")
    if _PEFT in reference:
        _check_peft(reference[_PEFT], where=f"{where}.{_PEFT}")
    for key, value in reference.items():
        if key in (*_NEWER, _PEFT):
            continue
        if key not in _REFERENCE:
            raise CheckpointError(f"{where} has an unknown key {shown(key)}")
        if type(value) not in _REFERENCE[key]:
            kinds = " or ".join(kind.__name__ for kind in _REFERENCE[key])
            raise CheckpointError(f"{where}.{key} must be {kinds}, got {shown(value)}")
    if not can_be_path(reference["name_or_path"]):
        name = shown(reference["name_or_path"])
        raise CheckpointError(f"{where}.name_or_path {name} is neither a path nor a name")


def _check_peft(value: Any, *, where: str) -> None:
    if not isinstance(value, dict) or value.keys() != {"peft_type", "weights"}:
        raise CheckpointError(f"{where} must hold peft_type and weights, got {shown(value)}")
    if not isinstance(value["peft_type"], str):
        raise CheckpointError(f"{where}.peft_type must be str, got {shown(value['peft_type'])}")
    if not isinstance(value["weights"], dict | None):
        raise CheckpointError(f"{where}.weights must be an object, got {shown(value['weights'])}")
    if value["weights"] is not None:
        check_form(value["weights"], where=f"{where}.weights")


def settings_digest(adapter: Mapping[str, Any], *, version: int = FORMAT_VERSION) -> str:
    """A checksum of the `adapter` section as a file of that version has it."""
    adapter = as_version_1(adapter) if version == 1 else adapter
    return hashlib.sha256(json.dumps(adapter, sort_keys=True).encode()).hexdigest()
