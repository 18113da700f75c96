"""Which base and which vision tower an adapter belongs to, and loading them again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from llama_adapter.errors import CheckpointError
from llama_adapter.model.hub import why_missing
from llama_adapter.model.visual_prompts import vision_tower_of

PACKAGE_SCHEME = "package:"
"""`package:NAME/PATH` means a folder inside an installed Python package."""


def resolve_reference(reference: str, *, directory: Path | None = None) -> str:
    """A name or path that transformers can load.

    A path relative to the adapter `directory` is taken from there; `package:` references point
    into an installed package; anything else is a name or path as it stands.
    """
    if reference.startswith(PACKAGE_SCHEME):
        package, _, inner = reference.removeprefix(PACKAGE_SCHEME).partition("/")
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise CheckpointError(f"{reference!r}: the package {package!r} is not installed")
        path = Path(spec.submodule_search_locations[0]) / inner
        if not path.is_dir():
            raise CheckpointError(f"{reference!r}: no folder {inner!r} in that package")
        return str(path)
    if directory is not None and not Path(reference).is_absolute():
        inside = directory / reference
        if inside.is_dir():
            return str(inside)
    return reference


def locate(reference: str, *, what: str) -> str:
    """As `resolve_reference`; CheckpointError at once where there can be no model of that name."""
    path = resolve_reference(reference)
    reason = why_missing(path)
    if reason is not None:
        raise CheckpointError(f"cannot load the {what} {reference!r}: {reason}")
    return path


def package_reference(path: str) -> str:
    """The `package:` form of a folder inside this package; any other path or name unchanged."""
    root = Path(__file__).resolve().parents[1]
    resolved = Path(path).resolve()
    if resolved.is_dir() and resolved.is_relative_to(root):
        return f"{PACKAGE_SCHEME}{root.name}/{resolved.relative_to(root).as_posix()}"
    return path


def describe_model(model: Any) -> dict[str, Any]:
    """A reference to a base or vision tower: name, shape, and a fingerprint of its numbers."""
    config = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    shape = getattr(config, "vision_config", text)
    name = str(getattr(model, "name_or_path", "") or getattr(config, "_name_or_path", ""))
    return {
        "name_or_path": package_reference(name) if name else "",
        "revision": getattr(config, "_commit_hash", None),
        "model_type": str(config.model_type),
        "hidden_size": int(shape.hidden_size),
        "num_hidden_layers": int(shape.num_hidden_layers),
        "fingerprint": fingerprint(model),
    }


def fingerprint(model: nn.Module) -> str | None:
    """A checksum of a sample of the model's numbers that survives a change of dtype.

    Adapters must be off. None for a model on the meta device.
    """
    sampled = [(n, p.detach()) for n, p in model.named_parameters() if is_fingerprinted(n)]
    if any(parameter.is_meta for _, parameter in sampled):
        return None
    return fingerprint_of((name, tuple(p.shape), p) for name, p in sampled)


def is_fingerprinted(name: str) -> bool:
    """Whether a parameter is embedding-like or norm-like, which no quantisation touches."""
    return "norm" in name.lower() or "embed" in name.lower()


def fingerprint_of(samples: Iterable[tuple[str, tuple[int, ...], Tensor]]) -> str:
    """The checksum of names, full shapes and the first numbers, rounded to bfloat16."""
    digest = hashlib.sha256()
    for name, shape, numbers in sorted(samples, key=lambda sample: sample[0]):
        sample = numbers.reshape(-1)[:256].cpu().to(torch.bfloat16).float()
        digest.update(f"{name}{shape}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:32]


def check_reference(model: nn.Module, expected: dict[str, Any], *, what: str, source: str) -> None:
    """Refuse another base (or tower) than the adapter was trained on.

    Raises CheckpointError with what was found and what was expected.
    """
    found = describe_model(model)
    for key in ("model_type", "num_hidden_layers", "hidden_size"):
        if found[key] != expected.get(key):
            raise CheckpointError(
                f"{source} was saved for a {what} with {key} {expected.get(key)}, "
                f"this {what} has {found[key]}"
            )
    if None not in (found["fingerprint"], expected.get("fingerprint")) and (
        found["fingerprint"] != expected["fingerprint"]
    ):
        raise CheckpointError(
            f"{source} was saved for another {what} of the same shape: its fingerprint is "
            f"{expected['fingerprint']}, this {what} has {found['fingerprint']}"
        )


def load_language_model(reference: str, **options: Any) -> PreTrainedModel:
    """A frozen decoder by name or path; CheckpointError if there is none there."""
    options = {key: value for key, value in options.items() if value is not None}
    path = locate(reference, what="base")
    try:
        model = AutoModelForCausalLM.from_pretrained(path, **options)
    except (ImportError, OSError, ValueError) as error:
        raise CheckpointError(f"cannot load the base {reference!r}: {error}") from error
    return model.eval()


def load_vision(reference: str, *, device: torch.device | None = None) -> nn.Module:
    """The visual half of a CLIP or SigLIP model by name or path, in its own dtype."""
    path = locate(reference, what="vision tower")
    try:
        config = AutoConfig.from_pretrained(path)
        model = _vision_class(config).from_pretrained(path)
    except (ImportError, OSError, ValueError) as error:
        raise CheckpointError(f"cannot load the vision tower {reference!r}: {error}") from error
    tower = vision_tower_of(model)
    return tower if device is None else tower.to(device)


def _vision_class(config: Any) -> Any:
    """The class to load: CLIP with its projection, which some adapters read."""
    architectures = getattr(config, "architectures", None) or []
    if config.model_type in ("clip", "clip_vision_model") and (
        config.model_type == "clip" or "CLIPVisionModelWithProjection" in architectures
    ):
        from transformers import CLIPVisionModelWithProjection

        return CLIPVisionModelWithProjection
    return AutoModel
