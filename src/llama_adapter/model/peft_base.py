"""A base with a frozen adapter of peft on it: told from the plain base, stored and loaded again.

LoRA that trains together with our adapter is `training/lora.py`.

What peft adds is small: it is stored in the adapter directory as peft stores it, and named and
compared apart, so that the base below keeps its own name and fingerprint.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from llama_adapter.errors import CheckpointError, MissingDependencyError, UnsupportedModelError
from llama_adapter.files import read_json_object
from llama_adapter.model.tensor_files import read_tensors
from llama_adapter.pretrained import explain

PEFT_FOLDER = "lora"
"""Where an adapter directory holds what peft has put on the base."""
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FILE_PREFIX = "base_model.model."
"""What peft writes before every name."""


@dataclass(frozen=True, kw_only=True)
class OnBase:
    """The adapter of peft that computes on a base."""

    config: Any
    places: Mapping[str, tuple[nn.Module, str]]
    """Which attribute of which module each tensor is, by its name in peft's files."""
    factors: Mapping[str, float]
    """What peft multiplies each low-rank product with."""

    def tensors(self) -> dict[str, Tensor]:
        """The tensors as they are now, by their names in peft's files."""
        return {n: getattr(module, name).detach() for n, (module, name) in self.places.items()}

    def save(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write a folder that peft loads; `tensors` are whole."""
        folder.mkdir(parents=True, exist_ok=True)
        self.config.save_pretrained(folder)
        held = {name: tensors[name].detach().cpu().contiguous().clone() for name in self.places}
        save_file(held, folder / WEIGHTS, metadata={"format": "pt"})

    def samples(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What tells it from another one: its tensors and what they are multiplied with."""
        return {**tensors, **{n: torch.tensor(value) for n, value in self.factors.items()}}


def unwrapped(model: Any) -> Any:
    """The transformers model inside a `PeftModel`, with peft's layers in it; others unchanged.

    Raises UnsupportedModelError where peft adds something other than layers, such as tokens.
    """
    peft = sys.modules.get("peft")
    if peft is None or not isinstance(model, peft.PeftModel):
        return model
    config = model.active_peft_config
    if config.is_prompt_learning:
        raise UnsupportedModelError(
            f"a base with peft's {config.peft_type.value} cannot be adapted: it adds tokens or "
            "keys to every pass, not layers"
        )
    return model.base_model.model


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that peft has put around others, by name."""
    tuners, other = sys.modules.get("peft.tuners.tuners_utils"), sys.modules.get("peft.utils.other")
    if tuners is None or other is None:
        return {}
    kinds = (tuners.BaseTunerLayer, other.AuxiliaryTrainingWrapper)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def base_parameters(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Parameters of the base below peft's layers: the plain name of each, and its present one."""
    around = {
        name: "base_layer" if hasattr(module, "base_layer") else "original_module"
        for name, module in _layers(model).items()
    }
    for name, _ in model.named_parameters():
        plain, path, is_of_base = [], "", True
        for part in name.split("."):
            inner = around.get(path)
            if inner is None:
                plain.append(part)
            is_of_base = is_of_base and inner in (None, part)
            path = f"{path}.{part}" if path else part
        if is_of_base:
            yield ".".join(plain), name


def on_base(model: Any) -> OnBase | None:
    """What peft has put on a base; None for a plain one.

    Raises UnsupportedModelError where it cannot be stored and loaded again as it computes now.
    """
    layers = _layers(model)
    if not layers:
        return None
    active, merged, off = set(), set(), False
    for module in layers.values():
        active |= set(module.active_adapters)  # type: ignore[arg-type]
        merged |= set(getattr(module, "merged_adapters", ()))
        off = off or bool(module.disable_adapters)
    advice = None
    if merged:
        advice = "is merged in place; unmerge_adapter() it, or save what merge_and_unload() gives"
    elif off:
        advice = "is switched off; switch it on, or take it off with unload()"
    elif len(active) != 1:
        advice = f"is several at once ({', '.join(sorted(active))}); set_adapter one of them"
    if advice is not None:
        raise UnsupportedModelError(f"the peft adapter on this base {advice}")
    [name] = active
    return _described(model, layers, name)


def _described(model: Any, layers: Mapping[str, nn.Module], adapter: str) -> OnBase:
    from peft import get_peft_model_state_dict

    configs = getattr(model, "peft_config", {})
    if adapter not in configs:
        raise UnsupportedModelError(f"the base has layers of peft, but no config of {adapter!r}")
    own = dict(model.named_parameters())
    names = {id(parameter): name for name, parameter in own.items()}
    found = get_peft_model_state_dict(
        model, state_dict=own, adapter_name=adapter, save_embedding_layers=False
    )
    places = {}
    for stored, tensor in found.items():
        parent, _, attribute = names[id(tensor)].rpartition(".")
        places[f"{FILE_PREFIX}{stored}"] = (model.get_submodule(parent), attribute)
    factors = {
        f"{FILE_PREFIX}{name}.scaling": float(layer.scaling[adapter])  # type: ignore[index]
        for name, layer in layers.items()
        if adapter in getattr(layer, "scaling", ())
    }
    return OnBase(config=configs[adapter], places=places, factors=factors)


def is_peft_folder(folder: Path) -> bool:
    """Whether a directory holds an adapter of peft."""
    if not (folder / CONFIG).is_file():
        return False
    return "peft_type" in read_json_object(folder / CONFIG, error=CheckpointError)


def read_peft_config(folder: Path) -> Any:
    """Peft's description of an adapter in a directory; CheckpointError where it is damaged."""
    try:
        import peft
    except ImportError as error:
        raise MissingDependencyError(
            "peft", extra="train", purpose=f"the peft adapter {folder}"
        ) from error
    if not (folder / CONFIG).is_file():  # peft would ask the hub for it
        raise CheckpointError(f"{folder / CONFIG} is missing")
    read_json_object(folder / CONFIG, error=CheckpointError)
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # peft raises what it likes
        raise CheckpointError(f"{folder / CONFIG} cannot be read: {explain(error)}") from error
    if config.is_prompt_learning:
        raise UnsupportedModelError(
            f"{folder} holds peft's {config.peft_type.value}, which adds tokens or keys to every "
            "pass, not layers: it cannot be part of a base"
        )
    return config


@torch.no_grad()
def put_on(model: Any, folder: Path) -> None:
    """Put an adapter of peft onto a base, with the values of its file, in the file's dtype.

    Raises CheckpointError where it does not fit the base.
    """
    config, tensors = read_peft_config(folder), read_tensors(folder / WEIGHTS)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise UnsupportedModelError(
            f"{folder} cannot be put onto a base that is offloaded; merge it with peft's "
            "merge_and_unload, save that and use it as the base"
        )
    from peft import inject_adapter_in_model

    config.inference_mode = True
    try:
        inject_adapter_in_model(config, model)
    except Exception as error:  # so does what it wraps
        raise CheckpointError(f"{folder} does not fit the base: {explain(error)}") from error
    part = on_base(model)
    own = {} if part is None else part.places
    odd = sorted(own.keys() ^ tensors.keys())
    if odd:
        state = "lacks" if odd[0] in own else "has unexpected"
        raise CheckpointError(f"{folder / WEIGHTS} {state} {odd[:3]} ({len(odd)} in all)")
    for name, (module, attribute) in own.items():
        parameter, stored = getattr(module, attribute), tensors[name]
        if parameter.shape != stored.shape:
            raise CheckpointError(
                f"{folder / WEIGHTS}: tensor {name} has shape {list(stored.shape)}, this base "
                f"expects {list(parameter.shape)}"
            )
        if not stored.isfinite().all():
            raise CheckpointError(f"{folder / WEIGHTS}: tensor {name} holds values not finite")
        parameter.data = stored.to(parameter.device)
        parameter.requires_grad_(False)
    model.eval()
