"""Turning a released checkpoint into an adapter directory (`llama-adapter import`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from llama_adapter.checkpoints.bases import REFERENCE, Base, describe_stored
from llama_adapter.checkpoints.directories import output_directory
from llama_adapter.checkpoints.extras import Origin, write_extras
from llama_adapter.checkpoints.layout import Entry, layout
from llama_adapter.checkpoints.meta_base import Progress
from llama_adapter.checkpoints.released import Kind, Released, read_released
from llama_adapter.checkpoints.settings import Overrides, settings
from llama_adapter.checkpoints.tokenizers import convert_tokenizer, find_tokenizer
from llama_adapter.checkpoints.torch_files import why_not_finite
from llama_adapter.checkpoints.unexpected import what_directory
from llama_adapter.checkpoints.vision_encoder import read_openai_clip
from llama_adapter.config import AdapterConfig
from llama_adapter.errors import CheckpointError, ConfigError
from llama_adapter.families.vision import vision_feature_size
from llama_adapter.model.configuration import LlamaAdapterConfig
from llama_adapter.model.persistence import ADAPTER_WEIGHTS_NAME, write_tensors
from llama_adapter.model.references import describe_model, load_vision
from llama_adapter.pretrained import load_pretrained

TEMPLATE_OF_KIND = {Kind.V2_CHAT: "human-assistant"}
"""Prompt templates of released adapters that are not Alpaca's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportReport:
    """What an import did."""

    out: Path
    kind: Kind
    config: AdapterConfig
    num_tensors: int
    """Tensors of the released file that the adapter uses."""
    unused: tuple[str, ...]
    """Tensors that its settings leave without effect (kept for writing the file back)."""
    base: str
    """`converted` or `referenced`."""
    warnings: tuple[str, ...] = field(default=())


@dataclass(frozen=True, kw_only=True, slots=True)
class _Vision:
    """A vision encoder: its model, and where it is if it stays there."""

    model: Any
    directory: Path | None


def import_released(
    checkpoint: Path,
    *,
    base: Path,
    out: Path,
    vision: Path | None = None,
    gate: str = "tanh",
    overrides: Overrides | None = None,
    allow_other_base: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ImportReport:
    """Write an adapter directory at `out`, whole or not at all.

    A base in Meta's layout is converted into `out`/base, OpenAI's CLIP into `out`/vision; Hugging
    Face directories are referenced where they are. `progress` is told about the base.
    Raises CheckpointError naming file, tensor, found and expected; nothing is left behind then.
    """
    sources = tuple(path for path in (checkpoint, base, vision) if path is not None)
    with output_directory(out, overwrite=overwrite, sources=sources) as stage:
        _refuse_directory(checkpoint)
        released = read_released(checkpoint)
        opened = Base.open(base)
        _check_base(released, opened, allow_other_base)
        training = _training_checkpoint(released, opened, allow_other_base)
        overrides = (overrides or Overrides()).or_else(Overrides.next_to(checkpoint))
        config, warnings = settings(
            released, opened.shape, base=str(base), gate=gate, overrides=overrides
        )
        warnings += training
        if allow_other_base and (why := opened.why_other()) is not None:
            warnings.append(
                f"{base} is not a base that {checkpoint} was trained for: {why}; "
                "expect worse answers"
            )
        encoder = _open_vision(released, vision, config, warnings)
        entries = _fit(released, config, opened, base, encoder)
        warnings += _not_finite(released)
        tokenizer = _tokenizer(opened)  # before the base: converting one may take an hour
        _write_adapter(stage, released, entries, opened, config)
        described = _place_base(stage, opened, progress)
        _write_config(stage, config, described, encoder)
        _write_tokenizer(stage, opened, tokenizer)
        _write_processor(stage, opened, tokenizer, encoder, config, released.kind, warnings)
    used = {entry.official for entry in entries}
    return ImportReport(
        out=out,
        kind=released.kind,
        config=config,
        num_tensors=len(used & released.tensors.keys()),
        unused=tuple(name for name in released.tensors if name not in used),
        base="referenced" if opened.meta is None else "converted",
        warnings=tuple(warnings),
    )


def _check_base(released: Released, base: Base, allow_other_base: bool) -> None:
    why = base.why_other()
    if why is not None and not allow_other_base:
        raise CheckpointError(
            f"{released.path} was made for LLaMA 1, the base {base.directory} is another: {why} "
            "(--allow-other-base imports it all the same)"
        )


def _refuse_directory(checkpoint: Path) -> None:
    if checkpoint.is_dir():
        raise CheckpointError(
            f"{checkpoint} is {what_directory(checkpoint)}; expected a .pth file of the authors"
        )


def _training_checkpoint(released: Released, base: Base, allow_other_base: bool) -> list[str]:
    """Warnings about what of a training checkpoint is left out, if it is one.

    Raises CheckpointError if the base that it was trained on is another, unless that is allowed.
    """
    warnings = []
    frozen = [f"the base's own {len(released.frozen)} tensors"] if released.frozen else []
    left_out = [*frozen, *released.left_out]
    if left_out:
        warnings.append(
            f"{released.path} is a checkpoint of a training run: left out are {', '.join(left_out)}"
        )
    other = base.differing(released.frozen)
    if other is not None:
        says = f"{released.path}: tensor {other} is not that of the base {base.directory}"
        if not allow_other_base:
            raise CheckpointError(
                f"{says}: it was trained on another (--allow-other-base imports it all the same)"
            )
        warnings.append(says)
    return warnings


def _open_vision(
    released: Released, vision: Path | None, config: AdapterConfig, warnings: list[str]
) -> _Vision | None:
    if not config.is_multimodal:
        if vision is not None:
            warnings.append(f"{released.path} reads no images; {vision} is not used")
        return None
    if vision is None:
        raise ConfigError(
            f"{released.path} is a multimodal checkpoint ({released.kind}): --vision is needed, "
            "OpenAI's ViT-L-14.pt or a Hugging Face CLIP directory"
        )
    if vision.is_dir():
        directory = vision.resolve()
        model = load_vision(str(directory))
        return _Vision(model=model, directory=directory)
    return _Vision(model=read_openai_clip(vision), directory=None)


def _fit(
    released: Released, config: AdapterConfig, base: Base, directory: Path, encoder: _Vision | None
) -> list[Entry]:
    """Every tensor that must be there; CheckpointError unless all of them are, in shape."""
    feature_size = None if encoder is None else vision_feature_size(encoder.model, config)
    entries = layout(released.kind, config, base.shape, feature_size=feature_size)
    tensors = released.tensors
    for entry in entries:
        tensor = tensors.get(entry.official)
        if tensor is None:
            if _may_be_absent(released, entry):
                continue
            raise CheckpointError(
                f"{released.path} lacks tensor {entry.official} of shape {list(entry.shape)}; "
                f"found {len(tensors)} tensors, expected {len(entries)} "
                f"({released.kind} on the base {directory})"
            )
        if tuple(tensor.shape) != entry.shape:
            what = "the vision encoder" if entry.official == "clip_proj.weight" else "the base"
            raise CheckpointError(
                f"{released.path}: tensor {entry.official} has shape {list(tensor.shape)}, "
                f"expected {list(entry.shape)} for {what}"
            )
    _refuse_unexpected(released, {entry.official for entry in entries})
    return entries


def _may_be_absent(released: Released, entry: Entry) -> bool:
    # the released chat file leaves the base's final norm as it is
    return released.kind is Kind.V2_CHAT and entry.official == "norm.weight"


def _refuse_unexpected(released: Released, known: set[str]) -> None:
    """Gates of layers without prompts are harmless; anything else would go silently wrong."""
    for name in released.tensors:
        if name not in known and not name.endswith((".attention.gate", ".attention.new_gate")):
            raise CheckpointError(
                f"{released.path} has tensor {name}, which no {released.kind} checkpoint has on "
                "this base"
            )


def _not_finite(released: Released) -> list[str]:
    """Warnings about values that the file has; CheckpointError for what float32 would add."""
    warnings = []
    for name, tensor in released.tensors.items():
        if (why := why_not_finite(tensor, tensor.dtype)) is not None:
            warnings.append(f"{released.path}: tensor {name} {why}")
        elif (why := why_not_finite(tensor, torch.float32)) is not None:
            raise CheckpointError(f"{released.path}: tensor {name} {why}")
    return warnings


def _write_adapter(
    stage: Path, released: Released, entries: list[Entry], base: Base, config: AdapterConfig
) -> None:
    ours: dict[str, Tensor] = {}
    extras: dict[str, Tensor] = {}
    used = set()
    absent = []
    for entry in entries:
        tensor = released.tensors.get(entry.official)
        if tensor is None:
            tensor = base.final_norm()
            absent.append(entry.official)
            extras[entry.official] = tensor.contiguous()
        used.add(entry.official)
        ours |= {name: part.float() for name, part in entry.to_ours(tensor).items()}
    extras |= {n: t.clone() for n, t in released.tensors.items() if n not in used}
    write_tensors(stage / ADAPTER_WEIGHTS_NAME, ours, config=config)
    origin = Origin(
        kind=released.kind,
        is_wrapped=released.is_wrapped,
        config=released.file_config,
        dtypes={n: str(t.dtype).removeprefix("torch.") for n, t in released.tensors.items()},
        absent=tuple(absent),
    )
    write_extras(stage, origin, extras)


def _place_base(stage: Path, base: Base, progress: Progress | None) -> dict[str, Any]:
    """The reference to the base, converted into the stage if it must be."""
    if base.meta is None:
        return describe_stored(base.directory, reference=str(base.directory))
    target = stage / REFERENCE
    target.mkdir()
    base.meta.convert(target, progress=progress)
    return describe_stored(target, reference=REFERENCE)


def _write_config(
    stage: Path, config: AdapterConfig, base: Mapping[str, Any], encoder: _Vision | None
) -> None:
    vision = None
    if encoder is not None:
        reference = "vision" if encoder.directory is None else str(encoder.directory)
        vision = {**describe_model(encoder.model), "name_or_path": reference}
        if encoder.directory is None:
            encoder.model.save_pretrained(stage / "vision")
    LlamaAdapterConfig(adapter=config, base=dict(base), vision=vision).save_pretrained(stage)


def _write_processor(
    stage: Path,
    base: Base,
    tokenizer: PreTrainedTokenizerBase | None,
    encoder: _Vision | None,
    config: AdapterConfig,
    kind: Kind,
    warnings: list[str],
) -> None:
    if tokenizer is None:
        warnings.append(
            f"the base {base.directory} has no tokenizer: the adapter takes token ids only; chat "
            "and eval need tokenizer.model next to or above the base"
        )
        return
    from transformers import CLIPImageProcessorPil

    from llama_adapter.processing.processor import LlamaAdapterProcessor

    images = None
    if encoder is not None:
        vision_config = getattr(encoder.model.config, "vision_config", encoder.model.config)
        side = int(vision_config.image_size)
        images = CLIPImageProcessorPil(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        )
    LlamaAdapterProcessor(
        images,
        tokenizer,
        template=TEMPLATE_OF_KIND.get(kind, "alpaca"),
        channel_order=config.channel_order,
    ).save_pretrained(stage)


def _tokenizer(base: Base) -> PreTrainedTokenizerBase | None:
    """The base's tokenizer, converted if the base is in Meta's layout; None if it has none.

    Raises CheckpointError if it cannot be read or does not fit the base.
    """
    if base.meta is None:
        if not any((base.directory / n).is_file() for n in ("tokenizer.json", "tokenizer.model")):
            return None
        return load_pretrained(AutoTokenizer, base.directory, what="tokenizer of")
    path = find_tokenizer(base.directory)
    if path is None:
        return None
    config = base.meta.config
    return convert_tokenizer(
        path, vocab_size=config.vocab_size, context_length=config.max_position_embeddings
    )


def _write_tokenizer(stage: Path, base: Base, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Store the tokenizer next to a converted base, whose configuration learns its ids."""
    if base.meta is None or tokenizer is None:
        return
    config = base.meta.config
    tokenizer.save_pretrained(stage / REFERENCE)
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.save_pretrained(stage / REFERENCE)
