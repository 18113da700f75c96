"""What `save_pretrained` writes: the adapter's own tensors, whatever trainers pass along."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor, nn

from llama_adapter.config import did_you_mean
from llama_adapter.errors import ConfigError
from llama_adapter.model.peft_base import OnBase

if TYPE_CHECKING:
    from llama_adapter.model.modeling import LlamaAdapterForConditionalGeneration

_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
"""What wrappers of torch put into names."""
_DEFAULTS: dict[str, tuple[Any, ...]] = {
    "safe_serialization": (True,),
    "variant": (None,),
    "save_peft_format": (True,),
    "save_original_format": (True,),
    "distributed_checkpoint": (False,),
    "push_to_hub": (False,),
}
"""Keywords of transformers and peft that have one value here."""


def refuse_unknown(keywords: Mapping[str, Any]) -> None:
    """ConfigError for a keyword of `save_pretrained` that has no meaning for an adapter."""
    for name, value in keywords.items():
        if name in ("max_shard_size", "token"):  # nothing is uploaded; see `refuse_shards`
            continue
        if name not in _DEFAULTS:
            raise ConfigError(
                f"save_pretrained has no keyword {name!r}{did_you_mean(name, _DEFAULTS)}"
            )
        if name == "push_to_hub" and value:
            raise ConfigError("save_pretrained does not upload: call push_to_hub(NAME) instead")
        if value not in _DEFAULTS[name]:
            raise ConfigError(
                f"save_pretrained of an adapter cannot do {name}={value!r}: it is one file of "
                "safetensors with a fixed name"
            )


def refuse_shards(tensors: Mapping[str, Tensor], size: int | str | None) -> None:
    """ConfigError where an adapter's one file would be larger than `size`, such as `5GB`."""
    if size is None:
        return
    try:
        shards = split_torch_state_dict_into_shards(dict(tensors), max_shard_size=size)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"max_shard_size must be a size as 5GB, got {size!r}") from error
    if shards.is_sharded:
        raise ConfigError(
            f"save_pretrained of an adapter cannot do max_shard_size={size!r}: it is one file, "
            "which is larger"
        )


def refuse_save_function(function: Callable[..., Any] | None) -> None:
    """ConfigError for a function that would write something else than the adapter's file."""
    if function is None or function is torch.save:
        return
    if type(getattr(function, "__self__", None)).__name__ != "Accelerator":
        raise ConfigError(
            "save_pretrained of an adapter takes accelerator.save or no save_function: its file "
            "has checksums that other functions do not write"
        )


def plain_name(name: str) -> str:
    """A tensor's name in the plain model, whatever wraps it or its parts."""
    name = _WRAPPERS.sub("", name)
    while name.startswith("module."):  # of data-parallel models, from the outside
        name = name.removeprefix("module.")
    return name


def adapter_to_save(
    model: LlamaAdapterForConditionalGeneration,
    name: str,
    state_dict: Mapping[str, Tensor] | None,
) -> dict[str, Tensor]:
    """A loaded adapter's tensors by their names in files, of the model or of `state_dict`.

    Raises ConfigError where they are not all there as a whole.
    """
    places = model._loaded(name).places()
    return _to_save(model, places, state_dict, what=f"adapter {name!r}")


def peft_to_save(
    model: LlamaAdapterForConditionalGeneration,
    part: OnBase,
    state_dict: Mapping[str, Tensor] | None,
) -> dict[str, Tensor]:
    """The tensors of what peft has put on the base, as `adapter_to_save`."""
    return _to_save(model, part.places, state_dict, what="peft adapter on the base")


def _to_save(
    model: nn.Module,
    places: Mapping[str, tuple[nn.Module, str]],
    state_dict: Mapping[str, Tensor] | None,
    *,
    what: str,
) -> dict[str, Tensor]:
    own = {name: module.get_parameter(inner) for name, (module, inner) in places.items()}
    found: dict[str, Tensor] = dict(own)
    if state_dict is not None:
        given = {plain_name(name): tensor for name, tensor in state_dict.items()}
        names = {id(module): plain_name(name) for name, module in model.named_modules()}
        found = {}
        for name, (module, inner) in places.items():
            # of the whole model, or by its name in files
            whole = f"{names[id(module)]}.{inner}" if id(module) in names else name
            if (tensor := given.get(whole, given.get(name))) is not None:
                found[name] = tensor
    missing = sorted(own.keys() - found.keys())
    if missing:
        raise ConfigError(
            f"state_dict lacks {missing[:3]} ({len(missing)} in all) of the {what}; pass that of "
            "the whole model, as accelerator.get_state_dict(model) gives it, or none"
        )
    for name, tensor in found.items():
        _check_whole(name, tensor, own[name], what=what)
    return {name: tensor.detach() for name, tensor in found.items()}


def _check_whole(name: str, tensor: Tensor, own: Tensor, *, what: str) -> None:
    """ConfigError for a tensor of which only a part, or nothing, is here."""
    is_spread = tensor.is_meta or type(tensor).__name__ == "DTensor"
    expected = tuple(getattr(own, "ds_shape", own.shape))  # of a parameter that DeepSpeed holds
    if is_spread or (0 not in expected and tuple(tensor.shape) != expected) or not tensor.numel():
        raise ConfigError(
            f"tensor {name} of the {what} is not here as a whole (shape {list(tensor.shape)}, "
            f"expected {list(expected)}); pass state_dict=accelerator.get_state_dict(model)"
        )
