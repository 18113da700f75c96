"""Which base and which vision encoder an adapter belongs to, and loading them again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

from llama_adapter.config import shown
from llama_adapter.errors import CheckpointError, UnsupportedModelError
from llama_adapter.families.multimodal import loader_of, text_decoder_of
from llama_adapter.families.vision import vision_encoder_of
from llama_adapter.files import can_be_path
from llama_adapter.home import HOME_SCHEME, home
from llama_adapter.model.equivalence import is_equivalent
from llama_adapter.model.fingerprints import (
    base_values,
    check_settings,
    compare_weights,
    fingerprints,
    fingerprints_of_tensors,
    is_quantized,
    sampled,
    settings_of,
)
from llama_adapter.model.hub import peft_folder, why_missing
from llama_adapter.model.kinds import read_base_config, read_encoder_config
from llama_adapter.model.loading import folder_of, load_whole
from llama_adapter.model.peft_base import (
    OnBase,
    on_base,
    put_on,
    read_peft_config,
)
from llama_adapter.model.tensor_files import read_tensor, stored_tensors, weight_files

PACKAGE_ROOT = Path(__file__).resolve().parents[1]
PACKAGE_SCHEME = f"package:{PACKAGE_ROOT.name}/"
"""`package:llama_adapter/PATH` means a folder that this package brings along."""
_RENAMED = {"toyworld/": "miniature/"}
"""Beginnings of such paths as earlier versions wrote them, and what they are called now."""


def resolve_reference(reference: str, *, directory: Path | None = None) -> str:
    """A name or path that transformers can load.

    A path relative to the adapter `directory` is taken from there; `package:` references are
    folders of this package and of no other, so that no name can make Python import something;
    anything else is a name or path as it is. Raises CheckpointError for what cannot be one.
    """
    if not can_be_path(reference):
        raise CheckpointError(f"{shown(reference)} is neither a path nor a name")
    if reference.startswith("package:"):
        return str(_own_folder(reference))
    if reference.startswith(HOME_SCHEME):
        return str(_fetched_folder(reference))
    if directory is not None and not Path(reference).is_absolute():
        inside = directory / reference
        if inside.is_dir():
            return str(inside)
    return reference


def _own_folder(reference: str) -> Path:
    """The folder of this package that a `package:` reference means."""
    inner = reference.removeprefix(PACKAGE_SCHEME)
    if inner == reference:
        raise CheckpointError(
            f"{reference!r} must begin with {PACKAGE_SCHEME!r}: only folders of this package can "
            "be meant"
        )
    for before, now in _RENAMED.items():
        if inner.startswith(before):
            inner = now + inner.removeprefix(before)
    path = PACKAGE_ROOT / inner
    if ".." in path.parts or not path.resolve().is_relative_to(PACKAGE_ROOT) or not path.is_dir():
        raise CheckpointError(f"{reference!r}: this package has no folder {inner!r}")
    return path


def _fetched_folder(reference: str) -> Path:
    """The folder that a `home:` reference means: a model that `llama-adapter get` fetches."""
    inner = Path(reference.removeprefix(HOME_SCHEME))
    if inner.is_absolute() or ".." in inner.parts or not inner.parts:
        raise CheckpointError(f"{reference!r} must name a folder inside {home()}")
    if not (home() / inner).is_dir():
        raise CheckpointError(
            f"{reference!r} is not fetched yet: {home()} has no folder {str(inner)!r}; run: "
            f"llama-adapter get {inner.parts[0]}"
        )
    return home() / inner


def locate(reference: str, *, what: str) -> str:
    """As `resolve_reference`; CheckpointError at once where there can be no model of that name."""
    path = resolve_reference(reference)
    reason = why_missing(path)
    if reason is not None:
        raise CheckpointError(f"cannot load the {what} {reference!r}: {reason}")
    return path


def package_reference(path: str) -> str:
    """The `package:` form of a folder inside this package, the `home:` form of one inside `home()`;
    any other path or name unchanged.
    """
    resolved = Path(path).resolve()
    if resolved.is_dir() and resolved.is_relative_to(home().resolve()):
        return f"{HOME_SCHEME}{resolved.relative_to(home().resolve()).as_posix()}"
    if resolved.is_dir() and resolved.is_relative_to(PACKAGE_ROOT):
        return f"{PACKAGE_SCHEME}{resolved.relative_to(PACKAGE_ROOT).as_posix()}"
    return path


def describe_model(model: Any) -> dict[str, Any]:
    """A reference to a base or vision encoder: name, shape, and a fingerprint of its weights.

    Raises UnsupportedModelError where peft has put something on it that could not be loaded again.
    """
    config = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    shape = getattr(config, "vision_config", None) or text
    name = str(getattr(model, "name_or_path", "") or getattr(config, "_name_or_path", ""))
    part = on_base(model)
    return {
        **({} if part is None else {"peft": describe_peft(part)}),
        "name_or_path": package_reference(name) if name else "",
        "revision": getattr(config, "_commit_hash", None),
        "model_type": str(config.model_type),
        "hidden_size": _stated(shape, "hidden_size"),
        "num_hidden_layers": _stated(shape, "num_hidden_layers"),
        "fingerprint": fingerprint(model),
        "weights": fingerprints(model),
        "config": settings_of(shape),
    }


def _stated(config: Any, name: str) -> int:
    """A size of a config; 0 where it has several, as for the stages of a convolutional encoder."""
    value = getattr(config, name, None)
    return value if isinstance(value, int) else 0


def describe_peft(part: OnBase, tensors: dict[str, Tensor] | None = None) -> dict[str, Any]:
    """A reference to what peft has put on a base; `tensors` replace its own."""
    held = part.samples(part.tensors() if tensors is None else tensors)
    kind = str(getattr(part.config.peft_type, "value", part.config.peft_type))
    return {"peft_type": kind, "weights": fingerprints_of_tensors(held)}


def fingerprint(model: nn.Module) -> str | None:
    """Version 0.1's checksum, of the first values of embeddings and norms alone.

    Adapters must be off. None for a model on the meta device; what is offloaded is fetched.
    """
    samples = []
    for name, values in base_values(model, unquantized_only=True):
        if values.is_meta:
            return None
        samples.append((name, tuple(values.shape), values.reshape(-1)[:256].cpu()))
    return fingerprint_of(samples)


def fingerprint_of(samples: Iterable[tuple[str, tuple[int, ...], Tensor]]) -> str:
    """The checksum of names, full shapes and the first values, rounded to bfloat16."""
    digest = hashlib.sha256()
    for name, shape, values in sorted(samples, key=lambda sample: sample[0]):
        sample = values.reshape(-1)[:256].cpu().to(torch.bfloat16).float()
        digest.update(f"{name}{shape}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:32]


def check_reference(
    model: nn.Module, expected: dict[str, Any], *, what: str, directory: Path
) -> None:
    """Refuse another base (or encoder) than the adapter was trained on, or one declared equivalent.

    Raises CheckpointError with what was found and what was expected.
    """
    source = str(directory)
    found = describe_model(model)
    for key in ("model_type", "num_hidden_layers", "hidden_size"):
        if found[key] != expected.get(key):
            raise CheckpointError(
                f"{source} was saved for a {what} with {key} {expected.get(key)}, "
                f"this {what} has {found[key]}"
            )
    _check_peft(found, expected, what=what, source=source)
    _check_vocabulary(found, expected, what=what, source=source)
    if expected.get("config") is not None:
        check_settings(found["config"], expected["config"], what=what, source=source)
    if None not in (found["weights"], expected.get("weights")):

        def refuse(ours: str, theirs: str) -> None:
            if what == "base" and is_equivalent(model, directory):
                return
            raise CheckpointError(
                f"{source} was saved for another {what} of the same shape: its fingerprint is "
                f"{theirs}, this {what} has {ours}"
            )

        compare_weights(found["weights"], expected["weights"], refuse=refuse)
    elif None not in (found["fingerprint"], expected.get("fingerprint")) and (
        found["fingerprint"] != expected["fingerprint"]
    ):
        raise CheckpointError(
            f"{source} was saved for another {what} of the same shape: its fingerprint is "
            f"{expected['fingerprint']}, this {what} has {found['fingerprint']}"
        )


def _check_vocabulary(
    found: dict[str, Any], expected: dict[str, Any], *, what: str, source: str
) -> None:
    """Refuse a base to which tokens were added, or from which they were taken."""
    ours, theirs = ((d.get("config") or {}).get("vocab_size") for d in (found, expected))
    if None not in (ours, theirs) and ours != theirs:
        raise CheckpointError(
            f"{source} was saved for a {what} with vocab_size {shown(theirs)}, this {what} has "
            f"{shown(ours)}: give the {what} as it was, or resize its embeddings to "
            f"{shown(theirs)} tokens as they were when the adapter was trained"
        )


@torch.no_grad()
def what_differs(model: Any) -> str | None:
    """A tensor of a model that is not as in the files of its name; None where they agree.

    Known only where the files are on this machine. Rounding to another dtype does not count.
    """
    source = str(getattr(model, "name_or_path", ""))
    folder = folder_of(source, getattr(model.config, "_commit_hash", None)) if source else None
    stored = None if folder is None else stored_tensors(folder)
    if folder is None or stored is None:
        return None
    files = weight_files(folder)
    for name, values in base_values(model, unquantized_only=is_quantized(model)):
        known = stored.get(name)
        if known is None or known.shape != tuple(values.shape) or values.is_meta:
            continue  # stored by another name, or in another form
        ours, theirs = sampled(values), sampled(read_tensor(files[name], name))
        halves = (torch.bfloat16, torch.float16)
        if not any(torch.equal(ours.to(half), theirs.to(half)) for half in halves):
            return name
    return None


def _check_peft(found: dict[str, Any], expected: dict[str, Any], *, what: str, source: str) -> None:
    """Refuse a base with another adapter of peft, or without one where there was one."""
    ours, theirs = found.get("peft"), expected.get("peft")
    if theirs is None:
        if ours is not None and "weights" in expected:  # version 0.1 did not record it
            raise CheckpointError(
                f"{source} was saved for a plain {what}, this {what} has a peft adapter "
                f"({ours['peft_type']}) on it"
            )
        return
    if ours is None:
        raise CheckpointError(
            f"{source} was saved for a {what} with a peft adapter ({theirs['peft_type']}) on it, "
            f"this {what} has none (or one that is merged): leave language_model out to load it "
            "with the one that was saved"
        )
    if None in (ours["weights"], theirs["weights"]):
        return

    def refuse(our_print: str, their_print: str) -> None:
        raise CheckpointError(
            f"{source} was saved for a {what} with another peft adapter on it: its fingerprint is "
            f"{their_print}, the one on this {what} has {our_print}"
        )

    compare_weights(ours["weights"], theirs["weights"], refuse=refuse)


def load_language_model(reference: str, **options: Any) -> PreTrainedModel:
    """A frozen decoder by name or path, or an adapter of peft with the decoder that it is for.

    Of a multimodal model the text decoder is taken, and its own vision left out.

    Raises CheckpointError if there is none there.
    """
    options = {key: value for key, value in options.items() if value is not None}
    path = locate(reference, what="base")
    folder = peft_folder(path)
    below = path if folder is None else base_below(path)
    config = read_base_config(below, options.get("revision"))
    loaded = load_whole(loader_of(config), below, what="base", config=config, **options).eval()
    model = text_decoder_of(loaded)
    if folder is not None:
        put_on(model, folder)
    return model


def base_below(reference: str) -> str:
    """The decoder that an adapter of peft is for; of anything else, the name or path itself.

    Raises CheckpointError where the adapter does not say, or the decoder is not there.
    """
    folder = peft_folder(reference)
    if folder is None:
        return reference
    if stored_tensors(folder) is not None:
        raise UnsupportedModelError(
            f"{reference!r} holds both a model and a peft adapter; move the adapter's files into "
            "a directory of their own"
        )
    name = read_peft_config(folder).base_model_name_or_path
    if not name:
        raise CheckpointError(
            f"the peft adapter {reference!r} does not say which model it is for: its "
            "base_model_name_or_path is empty"
        )
    return locate(name, what=f"base of the peft adapter {reference!r},")


def load_vision(
    reference: str, *, device: torch.device | None = None, revision: str | None = None
) -> nn.Module:
    """The visual half of a CLIP or SigLIP model by name or path, in its own dtype."""
    path = locate(reference, what="vision encoder")
    config = read_encoder_config(path, revision)
    loader = _vision_class(config)
    encoder = vision_encoder_of(
        load_whole(loader, path, what="vision encoder", config=config, revision=revision)
    )
    return encoder if device is None else encoder.to(device)


def _vision_class(config: Any) -> Any:
    """The class to load: CLIP with its projection, which some adapters read."""
    architectures = getattr(config, "architectures", None) or []
    if config.model_type in ("clip", "clip_vision_model") and (
        config.model_type == "clip" or "CLIPVisionModelWithProjection" in architectures
    ):
        from transformers import CLIPVisionModelWithProjection

        return CLIPVisionModelWithProjection
    return AutoModel
