"""From a recipe's sections to open streams of batches and samples held out of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llama_adapter.data import (
    SOURCES,
    BatchStream,
    Component,
    DrawsOnOthers,
    InvalidRecord,
    Kind,
    Sample,
    SampleEncoder,
    Source,
    measure,
)
from llama_adapter.data.feature_cache import FeatureCache
from llama_adapter.errors import DataError
from llama_adapter.processing.processor import LlamaAdapterProcessor
from llama_adapter.training.callbacks import Progress, silent
from llama_adapter.training.recipe import (
    CACHE,
    DataSection,
    Recipe,
    SourceSection,
    SourceTypes,
    StreamSection,
    free_name,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOut:
    """Samples that training never sees, for evaluation."""

    kind: Kind
    source: Source
    indices: np.ndarray
    """Indices of the samples; captions of one image are next to each other."""
    groups: np.ndarray | None
    """For each of them the group, which captions of one image share."""

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Sample:
        return self.source[int(self.indices[index])]


@dataclass(frozen=True, kw_only=True, slots=True)
class RecipeData:
    """What a recipe trains and evaluates on."""

    streams: Mapping[Kind, BatchStream]
    encoders: Mapping[Kind, SampleEncoder]
    held_out: Mapping[str, HeldOut]
    """By the source's type; a second source of a type is called `type-2`."""
    invalid: tuple[InvalidRecord, ...] = ()
    """Records of which no sample could be made: they are in no row."""

    @property
    def sources(self) -> list[Source]:
        """Every source of every kind."""
        return [
            component.source for stream in self.streams.values() for component in stream.components
        ]

    def use_features(self, cache: FeatureCache) -> None:
        """From now on no image is decoded."""
        for encoder in self.encoders.values():
            encoder.features = cache


def open_data(
    recipe: Recipe,
    processor: LlamaAdapterProcessor,
    *,
    types: SourceTypes = SOURCES,
    rank: int = 0,
    world: int = 1,
    pin_memory: bool = False,
    progress: Progress = silent,
) -> RecipeData:
    """Open and measure every source of a recipe.

    Raises DataError for files that are missing or empty, and where more records of a source are
    invalid than `max_invalid` allows, with a list.
    """
    streams: dict[Kind, BatchStream] = {}
    encoders: dict[Kind, SampleEncoder] = {}
    held_out: dict[str, HeldOut] = {}
    for kind, section in recipe.streams.items():
        encoder = encoders[kind] = encoder_of(section, recipe.data, processor)
        components = []
        for described in section.sources:
            source, indices = open_source(described, kind, types=types)
            pieces = measure(
                source,
                encoder,
                workers=recipe.data.workers,
                cache=recipe.out / CACHE if recipe.data.cache else None,
                progress=progress(f"lengths of {source.name}", len(source)),
            )
            most = recipe.most_invalid(described)
            pieces.refuse_beyond(most, name=source.name)
            component = Component(
                source=source,
                pieces=pieces,
                weight=described.weight,
                held_out=indices,
                max_invalid=most,
            )
            components.append(component)
            if described.held_out:
                held_out[free_name(described.type, held_out)] = _held_out(component, kind)
        streams[kind] = stream_of(
            kind,
            components,
            encoder,
            section,
            recipe.data,
            seed=recipe.seed,
            rank=rank,
            world=world,
            # it tells packed samples apart in a single row alone, and silently mixes them in others
            join_rows=recipe.base.attention == "flash_attention_2",
            pin_memory=pin_memory,
        )
    all_components = (component for stream in streams.values() for component in stream.components)
    invalid = tuple(fault for component in all_components for fault in component.pieces.invalid)
    return RecipeData(streams=streams, encoders=encoders, held_out=held_out, invalid=invalid)


def stream_of(
    kind: Kind,
    components: Sequence[Component],
    encoder: SampleEncoder,
    section: StreamSection,
    data: DataSection,
    **options: Any,
) -> BatchStream:
    """The batches of a section."""
    return BatchStream(
        kind,
        components,
        encoder,
        rows=section.rows,
        row_length=section.row_length,
        padding=data.padding,
        workers=data.workers,
        max_invalid=data.max_invalid,
        group_by_length=data.group_by_length,
        **options,
    )


def encoder_of(
    section: StreamSection, data: DataSection, processor: LlamaAdapterProcessor
) -> SampleEncoder:
    """What encodes the samples of a section."""
    return SampleEncoder(processor, row_length=section.row_length, too_long=data.too_long)


def open_source(
    section: SourceSection, kind: Kind, *, types: SourceTypes
) -> tuple[Source, np.ndarray]:
    """A source, and the indices of its samples that are held out."""
    source = section.options(types).open(kind)
    held_out = choose_held_out(source, section.held_out)
    if isinstance(source, DrawsOnOthers):
        source.keep_apart(held_out)
    return source, held_out


def choose_held_out(source: Source, count: int) -> np.ndarray:
    """Indices of samples to hold out: at least `count`, all captions of an image or none.

    They are the same for every seed of a run: a training that goes on from another one with other
    samples must not learn what that held out, and runs with several seeds are compared on the same.

    Raises DataError where that leaves nothing to learn from.
    """
    if count == 0:
        return np.zeros(0, dtype=np.int64)
    groups = source.groups()
    if groups is None:
        groups = np.arange(len(source))
    names, sizes = np.unique(groups, return_counts=True)
    order = np.random.default_rng([0, len(names)]).permutation(len(names))
    enough = int(np.searchsorted(np.cumsum(sizes[order]), count)) + 1
    if enough >= len(names):
        together = len(names) < len(source)
        why = f": those of an image stay together, and there are {len(names)} images"
        raise DataError(
            f"{source.name}: held_out {count} of {len(source)} samples leaves none to learn from"
            f"{why if together else ''}; set held_out lower, or to 0 for none"
        )
    return np.flatnonzero(np.isin(groups, names[order[:enough]]))


def _held_out(component: Component, kind: Kind) -> HeldOut:
    assert component.held_out is not None
    # nothing can be asked about an invalid record
    sound = np.intersect1d(component.held_out, component.pieces.column("sample"))
    groups = component.source.groups()
    return HeldOut(
        kind=kind,
        source=component.source,
        indices=sound,
        groups=None if groups is None else groups[sound],
    )
