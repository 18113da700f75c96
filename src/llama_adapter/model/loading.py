"""Loading a base or a vision encoder whole: every tensor from its file, nothing made up.

transformers fills what a file lacks with random values, drops what it does not know, casts
integers to floats, and builds whatever sizes a config states; it logs some of that. Here each is
one error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from llama_adapter.errors import CheckpointError
from llama_adapter.model.tensor_files import (
    Stored,
    largest_dimension,
    not_floating,
    stored_tensors,
)
from llama_adapter.pretrained import COUNTS, load_pretrained, settings_in

_LAYERS = re.compile(r"^(num_hidden_layers|num_layers|n_layers?)$")
"""Settings that count layers; each has a tensor of its own."""
_FEW = 1024
"""As many modules are built in seconds."""
_SIZES = re.compile(
    r"(^(num|n|d)_)|((^|_)(size|dim|dims|width|heads?|experts|embd|rank|channels|groups)$)"
)
"""Settings that become a side of a tensor, or count modules."""
_POSITIONS = re.compile(r"position")
_PACKED = 8
"""Values that a quantized tensor packs into one element, at most."""
_SMALL = 1 << 16
"""Sizes up to here are harmless whatever is stored."""
_MOST_POSITIONS = 1 << 25
"""Three times the longest context of any published model; some families make a table of it."""
_PIECE = 1 << 24
"""Values that are looked at at once."""


def load_whole(
    loader: Any,
    where: str,
    *,
    what: str,
    config: Any = None,
    revision: str | None = None,
    **options: Any,
) -> PreTrainedModel:
    """A model of transformers with every tensor as stored; CheckpointError where one is not.

    `config` is what the directory's own config says, where `loader` reads only a part of it.
    """
    which: dict[str, Any] = {} if revision is None else {"revision": revision}
    if config is None:
        config = load_pretrained(AutoConfig, where, what=what, **which)
    folder = folder_of(where, revision)
    stored = None if folder is None else stored_tensors(folder)
    if stored is not None:
        check_sizes(config, stored, what=f"{what} {where!r}")
    if folder is not None:
        _check_total(loader, config, stored, folder, what=f"{what} {where!r}")
    # of mismatches the report says which tensor it is, and the exception does not
    reported: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, info = load_pretrained(loader, where, what=what, **reported, **which, **options)
    if stored is None and (folder := folder_of(where, revision)) is not None:
        stored = stored_tensors(folder)  # downloaded just now
    if not Path(where).is_dir() and (cached := folder_of(where, revision)) is not None:
        model.config._commit_hash = cached.name  # which newer versions of transformers leave out
    name = f"the {what} {where!r}"
    _check_method(model, name=name)
    ignored = _check_unexpected(model, config, set(info["unexpected_keys"]), name=name)
    _check_missing(model, set(info["missing_keys"]), name=name)
    if info["mismatched_keys"]:
        key, found, expected = min(info["mismatched_keys"])
        raise CheckpointError(
            f"{name}: tensor {key} has shape {list(found)}, its config expects {list(expected)} "
            f"({len(info['mismatched_keys'])} such tensors in all)"
        )
    if stored is not None and getattr(config, "quantization_config", None) is None:
        _check_floating(model, stored, ignored, name=name)
    check_finite(model, name=name)
    return model


def folder_of(where: str, revision: str | None = None) -> Path | None:
    """Folder with the files of a name or path on this machine; None if not yet there."""
    if Path(where).is_dir():
        return Path(where)
    cached = try_to_load_from_cache(where, "config.json", revision=revision)
    return Path(cached).parent if isinstance(cached, str) else None


def check_sizes(config: Any, stored: Mapping[str, Stored], *, what: str) -> None:
    """CheckpointError where a config states sizes that the stored tensors cannot have.

    Looked at before anything is built, since a layer count of a billion never ends.
    """
    widest = max(_PACKED * largest_dimension(stored), len(stored), _SMALL)
    for name, value in settings_in(config.to_dict()):
        if not isinstance(value, int | float):
            continue
        most = widest
        if _POSITIONS.search(name):
            most = _MOST_POSITIONS
        elif _LAYERS.search(name):
            most = len(stored)
        elif COUNTS.search(name):
            most = max(len(stored), _FEW)
        elif not _SIZES.search(name):
            continue
        if value > most:
            raise CheckpointError(
                f"cannot load the {what}: its config has {name} {value:.12g}, but its file holds "
                f"{len(stored)} tensors with at most {largest_dimension(stored)} in a row"
            )


def _check_total(
    loader: Any,
    config: Any,
    stored: Mapping[str, Stored] | None,
    folder: Path,
    *,
    what: str,
) -> None:
    """CheckpointError where a config asks for far more than the files hold.

    transformers would set aside memory for all of it, each size being plausible by itself.
    """
    if stored is None:  # no element takes less than a byte
        held = sum(path.stat().st_size for path in folder.glob("*.bin"))
    else:
        held = sum(math.prod(tensor.shape) for tensor in stored.values())
    if not held or (folder / "adapter_config.json").exists():  # peft's, of a base elsewhere
        return
    try:
        with torch.device("meta"):
            if hasattr(loader, "from_config"):
                model = loader.from_config(config, trust_remote_code=False)
            else:
                model = loader(getattr(config, "vision_config", config))
    except Exception:  # whatever is wrong with it, loading says it
        return
    wanted = sum(parameter.numel() for parameter in model.parameters())
    if wanted > _PACKED * held + _PIECE:
        raise CheckpointError(
            f"cannot load the {what}: its config asks for {wanted} parameters, but its files hold "
            f"{held} at most"
        )


def _check_method(model: PreTrainedModel, *, name: str) -> None:
    """CheckpointError for a quantization that transformers ignores because it does not know it."""
    stated = getattr(model.config, "quantization_config", None)
    if stated is not None and getattr(model, "hf_quantizer", None) is None:
        method = stated.get("quant_method") if isinstance(stated, dict) else stated
        raise CheckpointError(
            f"{name}: its config says that it is quantized by {str(method)[:80]!r}, which is not "
            "known"
        )


def _check_unexpected(
    model: PreTrainedModel, config: Any, keys: set[str], *, name: str
) -> set[str]:
    """The stored tensors that rightly have no place in the model; CheckpointError for others.

    Right are parts that the model as a whole lacks, where the file is of another class: the text
    half of a CLIP model whose visual half is read, the classifier of a classification model.
    """
    stated = getattr(config, "architectures", None) or []
    of_another_class = bool(stated) and type(model).__name__ not in stated
    modules = {module for module, _ in model.named_modules()}
    whole = {"", model.base_model_prefix}
    odd = []
    for key in sorted(keys):
        parent = key
        while parent not in modules:
            parent = parent.rpartition(".")[0]
        if not (of_another_class and parent in whole):
            odd.append(key)
    if odd and getattr(config, "quantization_config", None) is None:
        raise CheckpointError(
            f"{name} holds {odd[:3]} ({len(odd)} in all), which a {type(model).__name__} of its "
            "config does not have"
        )
    return keys


def _check_missing(model: PreTrainedModel, keys: set[str], *, name: str) -> None:
    if not keys:
        return
    if model.main_input_name == "pixel_values" and not _reach_features(model, keys):
        return
    shown = sorted(keys)
    raise CheckpointError(
        f"{name} lacks {shown[:3]} ({len(shown)} in all), which a {type(model).__name__} of its "
        "config needs"
    )


def _reach_features(model: PreTrainedModel, keys: set[str]) -> bool:
    """Whether anything that an adapter may read of an encoder depends on these tensors.

    Classification models come without the pooler of the plain model, which nothing here reads.
    """
    missing = [tensor for key, tensor in model.state_dict(keep_vars=True).items() if key in keys]
    encoder = getattr(model, "vision_model", model)
    config = getattr(model.config, "vision_config", model.config)
    try:
        sides = config.image_size
        height, width = (sides, sides) if isinstance(sides, int) else sides
        pixels = torch.zeros(1, config.num_channels, height, width, dtype=model.dtype)
        with torch.enable_grad():
            for tensor in missing:
                tensor.requires_grad_(True)
            output = encoder.eval()(pixel_values=pixels, output_hidden_states=True)
            read = [output.last_hidden_state, *(output.hidden_states or ())]
            read += [p for n, p in model.named_parameters() if n.startswith("visual_projection.")]
            total = sum((values.float().sum() for values in read), start=torch.zeros(()))
            reached = torch.autograd.grad(total, missing, allow_unused=True)
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return True
    for tensor in missing:
        tensor.requires_grad_(False).zero_()
    return any(gradient is not None for gradient in reached)


def _check_floating(
    model: PreTrainedModel, stored: Mapping[str, Stored], ignored: set[str], *, name: str
) -> None:
    """Integers may be stored for buffers of integers alone, such as positions."""
    patterns = [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())]
    buffers = [key for key, value in model.named_buffers() if not value.is_floating_point()]
    learned = [
        key
        for key in stored
        if key not in ignored
        and not any(re.search(pattern, key) for pattern in (*patterns, r"(^|\.)position_ids$"))
        and not any(key.endswith(buffer) or buffer.endswith(key) for buffer in buffers)
    ]
    odd = not_floating(stored, learned)
    if odd:
        raise CheckpointError(
            f"{name}: tensor {odd[0]} is stored as {stored[odd[0]].dtype}, expected a floating "
            f"dtype ({len(odd)} such tensors in all)"
        )


def check_finite(model: nn.Module, *, name: str) -> None:
    """CheckpointError where a value is not finite in the dtype that the model has it in."""
    for key, tensor in [*model.named_parameters(), *_lasting_buffers(model)]:
        if tensor.is_floating_point() and not tensor.is_meta and not is_finite(tensor.detach()):
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{name}: tensor {key} holds values that are not finite in {dtype}"
            )


def _lasting_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    stored = set(model.state_dict())
    return ((key, buffer) for key, buffer in model.named_buffers() if key in stored)


def is_finite(tensor: Tensor) -> bool:
    """Whether every value is finite; looked at in pieces, for the memory."""
    if tensor.element_size() == 1:  # float8, for which the operation does not exist
        return all(bool(piece.float().isfinite().all()) for piece in tensor.view(-1).split(_PIECE))
    return all(bool(piece.isfinite().all()) for piece in tensor.reshape(-1).split(_PIECE))
