"""Saving and loading adapter directories, strictly.

adapter_config.json          the adapter's settings, references to base and vision encoder
adapter_model.safetensors    the trained weights and nothing else; its metadata has checksums of
                             them and of the settings that they were trained with
config.json                  a stub that lets the Auto classes find us
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from llama_adapter.config import AdapterConfig
from llama_adapter.errors import CheckpointError, ConfigError
from llama_adapter.families.offloading import execution_device
from llama_adapter.families.vision import vision_feature_size
from llama_adapter.files import atomic_file
from llama_adapter.model.card import model_card, terms_of, write_card
from llama_adapter.model.configuration import (
    ADAPTER_CONFIG_NAME,
    LlamaAdapterConfig,
    read_adapter_config,
    settings_digest,
)
from llama_adapter.model.hub import HUB_OPTIONS, adapter_folder, hub_options, revision_at_hand
from llama_adapter.model.peft_base import PEFT_FOLDER, put_on, unwrapped
from llama_adapter.model.projection import VisualProjection
from llama_adapter.model.references import (
    check_reference,
    describe_peft,
    load_language_model,
    load_vision,
    resolve_reference,
)
from llama_adapter.model.saving import (
    adapter_to_save,
    peft_to_save,
    refuse_save_function,
    refuse_shards,
    refuse_unknown,
)
from llama_adapter.model.tensor_files import Header, not_floating, read_header, read_tensors
from llama_adapter.uploads import push_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llama_adapter.model.modeling import LlamaAdapterForConditionalGeneration

ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"
_TENSORS, _CONFIG = "sha256", "adapter_sha256"
"""Keys of the metadata; files of version 0.1 and of other programs have none."""
LORA_FOLDER = PEFT_FOLDER
"""Where an adapter directory keeps the peft factors that were trained with it."""

_IGNORED_LOADING_KEYWORDS = frozenset(
    {"adapter_kwargs", "config", "trust_remote_code", "code_revision", "_commit_hash", "_from_auto",
     "_from_pipeline", "tp_plan", "torch_dtype"}
)  # fmt: skip
"""What the Auto classes and pipelines pass along and an adapter has no use for.

`trust_remote_code` is a permission that is never used: code from files is refused by name.
"""


class AdapterPersistence:
    """`save_pretrained`, `from_pretrained`, `load_adapter` of the adapted model."""

    def save_pretrained(
        self,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        save_function: Callable[..., Any] | None = None,
        *,
        selected_adapters: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the active adapter; the base and the vision encoder are referenced, not copied.

        What peft has put on the base is written next to it. `state_dict` replaces the model's
        own, where that is spread over processes: of the whole model, as trainers gather it, or of
        the adapter by its names in files. Of `selected_adapters` each goes into a folder of its
        name, and `default` into the directory itself, as with peft. Processes other than the main
        one write nothing.

        Raises ConfigError for a `state_dict` without the adapter's tensors, and for what other
        models' `save_pretrained` can do and this one cannot.
        """
        model: LlamaAdapterForConditionalGeneration = self  # type: ignore[assignment]
        refuse_unknown(kwargs)
        refuse_save_function(save_function)
        accelerator = getattr(save_function, "__self__", None)
        if not (is_main_process and getattr(accelerator, "is_main_process", True)):
            return
        directory = Path(save_directory)
        chosen = {model.active_adapter: directory}
        if selected_adapters is not None:
            chosen = {n: directory if n == "default" else directory / n for n in selected_adapters}
        held = {}
        for name, folder in chosen.items():
            if Path(name).name != name:
                raise ConfigError(f"adapter {name!r} has no name that a folder can have")
            held[folder] = (model._loaded(name), adapter_to_save(model, name, state_dict))
            refuse_shards(held[folder][1], kwargs.get("max_shard_size"))
        part = model._on_base
        factors = None if part is None else peft_to_save(model, part, state_dict)
        base = base_to_record(model)
        if part is not None and factors is not None:
            base = {**base, "peft": describe_peft(part, factors)}
        for folder, (adapter, tensors) in held.items():
            folder.mkdir(parents=True, exist_ok=True)
            if part is not None and factors is not None:
                part.save(folder / PEFT_FOLDER, factors)
            write_tensors(folder / ADAPTER_WEIGHTS_NAME, tensors, config=adapter.config)
            config = LlamaAdapterConfig(
                adapter=adapter.config,
                base=_relative_to(folder, base),
                vision=_relative_to(folder, model.config.vision),
            )
            config.save_pretrained(folder)
            write_card(folder, config, terms=adapter.terms)
            self._after_saving(folder)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        max_shard_size: int | str | None = None,
        tags: Sequence[str] | None = None,
        **options: Any,
    ) -> str:
        """Upload what `save_pretrained` writes to a repository on the hub; returns its address.

        A repository without a model card gets one, with `tags` in it. `options` are
        `commit_message`, `commit_description`, `private`, `token`, `revision` and `create_pr`.
        Raises ConfigError where base or vision encoder are known by a directory of this machine,
        which nobody else has.
        """
        model: LlamaAdapterForConditionalGeneration = self  # type: ignore[assignment]
        for what, described in (("base", model.config.base), ("vision", model.config.vision)):
            name = str((described or {}).get("name_or_path") or "")
            if Path(name).is_absolute() or (name and Path(name).exists()):
                raise ConfigError(
                    f"the {what} is recorded as {name!r}, a directory of this machine: push it "
                    f"too, and set model.config.{what}['name_or_path'] to its name on the hub"
                )
        save = partial(self.save_pretrained, max_shard_size=max_shard_size)
        config = copy(model.config)
        if model._changed is not None:
            config.base = None  # as in the file
        card = partial(model_card, config, tags=tags or (), terms=model.adapter.terms)
        return push_folder(save, repo_id, what="adapter", card=card, **options)

    def _after_saving(self, directory: Path) -> None:
        """What else belongs into a directory that was just written."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *model_args: Any,
        language_model: PreTrainedModel | None = None,
        vision: nn.Module | None = None,
        dtype: torch.dtype | str | None = None,
        device_map: Any = None,
        offload_folder: str | Path | None = None,
        quantization_config: Any = None,
        attn_implementation: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """An adapter directory with its base and vision encoder, which may be given already loaded.

        An adapter on the hub is loaded by its name; `revision`, `subfolder`, `token`, `cache_dir`,
        `force_download` and `local_files_only` say which, for the adapter's own files.
        Raises CheckpointError for a directory that is damaged or belongs to another base.
        """
        for key in kwargs:
            if key not in _IGNORED_LOADING_KEYWORDS | HUB_OPTIONS:
                raise ConfigError(f"unknown option {key!r} for loading an adapter")
        _refuse_idle(model_args, kwargs)
        dtype = dtype if dtype is not None else kwargs.get("torch_dtype")
        directory = adapter_folder(str(pretrained_model_name_or_path), **hub_options(kwargs))
        content = read_adapter_config(directory)
        config = LlamaAdapterConfig.from_dict(content)
        assert isinstance(config, LlamaAdapterConfig)
        # the Auto classes lose the subfolder and pass the config next to it
        if kwargs.get("config") is not None and not kwargs.get("subfolder"):
            _check_given(kwargs["config"], config, directory)
        path = directory / ADAPTER_WEIGHTS_NAME
        header = check_header(path, content)
        config.base = _absolute(config.base, directory)
        config.vision = _absolute(config.vision, directory)
        if language_model is not None:
            language_model = unwrapped(language_model)
        else:
            name = _reference(config.base, "base", directory)
            language_model = load_language_model(
                name,
                revision=revision_at_hand(name, (config.base or {}).get("revision")),
                dtype=dtype,
                device_map=device_map,
                offload_folder=offload_folder,
                quantization_config=quantization_config,
                attn_implementation=attn_implementation,
            )
            if (directory / PEFT_FOLDER).is_dir():
                put_on(language_model, directory / PEFT_FOLDER)
        check_peft_folder(directory, config.base)
        check_reference(language_model, config.base or {}, what="base", directory=directory)
        if config.vision is not None:
            if vision is None:
                name = _reference(config.vision, "vision encoder", directory)
                vision = load_vision(
                    name,
                    revision=revision_at_hand(name, config.vision.get("revision")),
                    device=execution_device(language_model.get_input_embeddings()),
                )
            check_reference(vision, config.vision, what="vision encoder", directory=directory)
            check_projector(header, config.adapter_config, language_model, vision, source=str(path))
        model = cls(config, language_model=language_model, vision=vision)  # type: ignore[call-arg]
        try:
            model.adapter.load_state_dict(read_checked(path), source=str(path))  # type: ignore[attr-defined]
        except BaseException:  # the base may be shared, and goes on without this adapter
            model.adapter.detach()  # type: ignore[attr-defined]
            raise
        model.adapter.terms = terms_of(directory)  # type: ignore[attr-defined]
        return model.eval()  # type: ignore[attr-defined]

    def load_adapter(self, directory: Any, adapter_name: str = "default", **options: Any) -> None:
        """Load a further adapter onto the same base; `set_adapter` makes it the active one.

        `options` are those of `from_pretrained` for adapters on the hub. Raises CheckpointError
        if it belongs to another base or vision encoder, and ConfigError for an option of peft's.
        """
        for key in options:
            if key not in HUB_OPTIONS:
                raise ConfigError(f"unknown option {key!r} for loading an adapter")
        model: LlamaAdapterForConditionalGeneration = self  # type: ignore[assignment]
        if adapter_name in model.adapters:
            raise ConfigError(f"an adapter named {adapter_name!r} is loaded already")
        directory = adapter_folder(str(directory), **hub_options(options))
        content = read_adapter_config(directory)
        config = LlamaAdapterConfig.from_dict(content)
        path = directory / ADAPTER_WEIGHTS_NAME
        header = check_header(path, content)
        assert isinstance(config, LlamaAdapterConfig)
        check_peft_folder(directory, config.base)
        if (directory / PEFT_FOLDER).is_dir() and model._on_base is None:
            raise CheckpointError(
                f"{directory} was saved for a base with the peft adapter in "
                f"{directory / PEFT_FOLDER} on it, this base has none: load it alone"
            )
        with model.adapters_disabled():
            check_reference(
                model.language_model, config.base or {}, what="base", directory=directory
            )
            if config.vision is not None and model.vision is not None:
                check_reference(
                    model.vision, config.vision, what="vision encoder", directory=directory
                )
                adapter_config = config.adapter_config
                base, vision = model.language_model, model.vision
                check_projector(header, adapter_config, base, vision, source=str(path))
            adapter = model._new_adapter(config.adapter_config)
            try:
                adapter.load_state_dict(read_checked(path), source=str(path))
            finally:
                adapter.detach()
        adapter.terms = terms_of(directory)
        model._adapters[adapter_name] = adapter


def _refuse_idle(model_args: Sequence[Any], options: Mapping[str, Any]) -> None:
    """ConfigError for what an adapter cannot do and the Auto classes do not pass by themselves."""
    if model_args:
        raise ConfigError(
            "loading an adapter takes one positional argument, its name or path; "
            f"got {len(model_args)} more: give language_model and the others by name"
        )
    if options.get("tp_plan") is not None:
        raise ConfigError("tp_plan: an adapted model cannot be split over devices by tensors")
    if options.get("code_revision") is not None:
        raise ConfigError("code_revision: code from files is never run, of no revision")
    for name, value in (options.get("adapter_kwargs") or {}).items():
        passed = name.startswith("_") or (name in HUB_OPTIONS and value == options.get(name))
        if value is not None and not passed:
            raise ConfigError(
                f"adapter_kwargs {name!r} is for adapters of peft: give what says which adapter "
                "is meant as an option of its own"
            )


def _check_given(given: Any, stored: LlamaAdapterConfig, directory: Path) -> None:
    """ConfigError for a config that is another than the adapter's own."""
    if not isinstance(given, LlamaAdapterConfig) or given.to_dict() != stored.to_dict():
        raise ConfigError(
            f"config is not that of {directory / ADAPTER_CONFIG_NAME}, which its tensors are for: "
            "leave it out; another base is given by language_model"
        )


def check_peft_folder(directory: Path, base: Mapping[str, Any] | None) -> None:
    """CheckpointError where the config and the directory differ in what peft has put on the base.

    Version 0.1 wrote the folder alone.
    """
    stated, held = "peft" in (base or {}), (directory / PEFT_FOLDER).is_dir()
    if stated and not held:
        raise CheckpointError(
            f"{directory / PEFT_FOLDER} is missing: the {ADAPTER_CONFIG_NAME} next to it says that "
            "a peft adapter was on the base"
        )
    if held and not stated and "weights" in (base or {}):
        raise CheckpointError(
            f"{directory / ADAPTER_CONFIG_NAME}: base lacks peft, but there is a peft adapter in "
            f"{directory / PEFT_FOLDER}"
        )


def base_to_record(model: LlamaAdapterForConditionalGeneration) -> dict[str, Any]:
    """The reference to the base, without a name whose files hold something else."""
    base: dict[str, Any] = model.config.base or {}
    if model._changed is None:
        return base
    warnings.warn(
        f"the base is not what {base['name_or_path']!r} holds: its {model._changed} is another "
        "one, as after merging LoRA. The adapter is saved without the name of its base: save the "
        "base with language_model.save_pretrained(DIR), and set base.name_or_path in "
        f"{ADAPTER_CONFIG_NAME} to DIR or pass language_model= when loading",
        stacklevel=3,
    )
    return {**base, "name_or_path": "", "revision": None}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], *, config: AdapterConfig) -> None:
    """Write an adapter's tensors, with checksums of them and of what they mean."""
    state = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    metadata = {
        "format": "pt",
        _TENSORS: tensors_digest(state),
        _CONFIG: settings_digest(json.loads(json.dumps(config.to_dict()))),
    }
    written = save(state)
    length = int.from_bytes(written[:8], "little")
    # the library writes metadata in an order that changes from run to run
    header = {"__metadata__": metadata, **json.loads(written[8 : 8 + length])}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(path) as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        file.write(memoryview(written)[8 + length :])


def tensors_digest(state: Mapping[str, Tensor]) -> str:
    """A checksum of names, dtypes, shapes and every byte of tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_header(path: Path, content: Mapping[str, Any]) -> Header:
    """The header of an adapter's tensors, which fits `adapter_config.json`.

    Looked at before the base is loaded and before anything is built of the sizes in the config.
    Raises CheckpointError with what was found and what was expected.
    """
    header = read_header(path)
    adapter_config = AdapterConfig.from_dict(content["adapter"])
    stated = header.metadata.get(_CONFIG)
    if stated is not None and stated != settings_digest(
        content["adapter"], version=content["format_version"]
    ):
        raise CheckpointError(
            f"{path} was saved with other settings than the {ADAPTER_CONFIG_NAME} next to it has "
            "under adapter: one of the two files was changed or replaced"
        )
    odd = not_floating(header.tensors, header.tensors)
    if odd:
        raise CheckpointError(
            f"{path}: tensor {odd[0]} is stored as {header.tensors[odd[0]].dtype}, "
            "expected a floating dtype"
        )
    if content["base"] is not None:
        hidden_size = content["base"]["hidden_size"]
        rank = adapter_config.lora_rank
        sides = {".prompt": (0, adapter_config.prompt_length), ".lora_down": (0, rank),
                 ".lora_up": (-1, rank)}  # fmt: skip
        for ending, (axis, length) in sides.items():
            _check_side(header, ending, axis, length, path=path, hidden_size=hidden_size)
    return header


def _check_side(
    header: Header, ending: str, axis: int, length: int, *, path: Path, hidden_size: int
) -> None:
    """Compare a size in the config with the tensors that have it."""
    found = {n: t.shape for n, t in header.tensors.items() if n.endswith(ending)}
    if length and not found:
        raise CheckpointError(
            f"{path} lacks every tensor of the name *{ending}; "
            f"the {ADAPTER_CONFIG_NAME} next to it says they have {length}"
        )
    for name, shape in found.items():
        if len(shape) != 2 or shape[axis] != length:
            expected = [length, hidden_size] if ending == ".prompt" else f"{length} on axis {axis}"
            raise CheckpointError(
                f"{path}: tensor {name} has shape {list(shape)}, this base expects {expected}"
            )


def check_projector(
    header: Header,
    adapter_config: AdapterConfig,
    language_model: PreTrainedModel,
    vision: nn.Module,
    *,
    source: str,
) -> None:
    """CheckpointError where the stored projection has not the shapes that the config asks for."""
    if not adapter_config.is_multimodal:
        return
    if adapter_config.projector_blocks > len(header.tensors):  # before so many are built
        raise CheckpointError(
            f"{source} holds {len(header.tensors)} tensors, too few for projector_blocks "
            f"{adapter_config.projector_blocks}"
        )
    feature_size = vision_feature_size(vision, adapter_config)
    hidden_size = int(language_model.config.get_text_config().hidden_size)
    with torch.device("meta"):
        module = VisualProjection(feature_size, hidden_size, config=adapter_config)
    expected = {f"visual.{t.name}": tuple(t.parameter.shape) for t in module.trainables()}
    stored = {n: t.shape for n, t in header.tensors.items() if n.startswith("visual.")}
    for name in sorted(expected.keys() | stored.keys()):
        found, wanted = stored.get(name), expected.get(name)
        if found is None or wanted is None:
            raise CheckpointError(
                f"{source} {'lacks' if found is None else 'has unexpected'} {[name]}; "
                "it does not fit its adapter_config.json"
            )
        if found != wanted:
            raise CheckpointError(
                f"{source}: tensor {name} has shape {list(found)}, "
                f"this base and vision encoder expect {list(wanted)}"
            )


def read_checked(path: Path) -> dict[str, Tensor]:
    """As `read_tensors`, in float32; CheckpointError where the stored checksum is another."""
    tensors = read_tensors(path)
    stated = read_header(path).metadata.get(_TENSORS)
    if stated is not None and stated != tensors_digest(tensors):
        raise CheckpointError(f"{path} is damaged: its tensors do not have the checksum it states")
    return {name: tensor.float() for name, tensor in tensors.items()}


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
