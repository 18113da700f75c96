"""Features of every image, computed once by the frozen vision encoder before the first step."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from llama_adapter.data import Source
from llama_adapter.data.feature_cache import Computed, FeatureCache
from llama_adapter.data.truncation import whole_image
from llama_adapter.errors import LlamaAdapterError
from llama_adapter.families.vision import vision_features
from llama_adapter.model import LlamaAdapterForConditionalGeneration
from llama_adapter.model.references import describe_model
from llama_adapter.processing.processor import LlamaAdapterProcessor
from llama_adapter.training.callbacks import Progress
from llama_adapter.training.parallel import Communicator, on_rank_0
from llama_adapter.training.recipe import VisionSection

_SAMPLES = 32
"""Samples whose images are encoded together."""
_FRAMES = 64
_FILE_BYTES = 1 << 26
"""Of features in memory before they are written: so much is lost by a kill at most."""


def open_cache(
    section: VisionSection,
    model: LlamaAdapterForConditionalGeneration,
    processor: LlamaAdapterProcessor,
    *,
    folder: Path,
) -> FeatureCache:
    """The cache of this encoder, image processor and feature layer inside a folder."""
    described = describe_model(model.vision)
    about = {
        "encoder": {k: v for k, v in described.items() if k not in ("name_or_path", "revision")},
        "layer": model.adapter_config.vision_feature,
        "image_processor": processor.image_processor.to_dict(),
        "channel_order": processor.channel_order,
        "dtype": section.cache_dtype,
    }
    if model.adapter_config.vision_tokens != "all":  # caches of earlier versions hold all
        about["tokens"] = model.adapter_config.vision_tokens
    name = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()
    return FeatureCache(folder / name[:16], dtype=getattr(torch, section.cache_dtype))


def fill_cache(
    cache: FeatureCache,
    sources: Sequence[Source],
    model: LlamaAdapterForConditionalGeneration,
    processor: LlamaAdapterProcessor,
    *,
    communicator: Communicator,
    workers: int,
    progress: Progress,
) -> None:
    """Compute what the cache lacks of the sources' images; every process takes a share.

    Computed without autocast, as inference does. Images that cannot be read are left out.
    """
    missing: list[tuple[int, int]] = []

    def look() -> None:
        missing.extend(_missing(sources, cache))
        cache.remember_files()

    on_rank_0(communicator, look)
    missing = communicator.gather(missing)[0]
    mine = missing[communicator.rank :: communicator.world_size]
    advance = progress("image features", len(mine)) if mine else lambda _done: None
    chunks = [mine[at : at + _SAMPLES] for at in range(0, len(mine), _SAMPLES)]
    loader = DataLoader(
        _Decoder(sources, cache, processor),
        sampler=chunks,
        batch_size=None,
        num_workers=min(workers, len(chunks)),
        collate_fn=_unchanged,
        generator=torch.Generator(),
    )
    waiting: list[Computed] = []
    for chunk, decoded in zip(chunks, loader, strict=True):
        waiting += _encoded(decoded, model)
        if sum(c.features.nbytes for c in waiting) >= _FILE_BYTES:
            cache.add(waiting)
            waiting = []
        advance(len(chunk))
    if waiting:
        cache.add(waiting)
    communicator.gather(None)  # until all have written
    cache.reload()


def _missing(sources: Sequence[Source], cache: FeatureCache) -> Iterator[tuple[int, int]]:
    """Indices of source and sample whose images have no features yet; each image once."""
    seen: set[str] = set()
    for number, source in enumerate(sources):
        groups = source.groups()
        done = set()
        for index in range(len(source)):
            group = index if groups is None else int(groups[index])
            if group in done:
                continue
            try:
                keys = {cache.key(ref) for ref in source[index].conversation.images}
            except LlamaAdapterError:
                continue
            done.add(group)
            if any(key not in cache and key not in seen for key in keys):
                seen |= keys
                yield number, index


def _unchanged(item: Any) -> Any:
    return item


class _Decoder(Dataset[Any]):
    """Decodes the images of some samples; runs in worker processes."""

    def __init__(
        self, sources: Sequence[Source], cache: FeatureCache, processor: LlamaAdapterProcessor
    ) -> None:
        self.sources = sources
        self.cache = cache
        self.processor = processor

    def __getitem__(self, samples: Sequence[tuple[int, int]]) -> list[Computed]:
        """Pixels, in place of features, by key."""
        found: dict[str, Computed] = {}
        for number, index in samples:
            for ref in self.sources[number][index].conversation.images:
                try:
                    key = self.cache.key(ref)
                    if key in self.cache or key in found:
                        continue
                    pixels = self.processor.pixel_values([whole_image(ref)])[0]
                except LlamaAdapterError:
                    continue
                found[key] = Computed(key, len(pixels) if pixels.ndim == 4 else 0, pixels)
        return list(found.values())


def _encoded(
    decoded: Sequence[Computed], model: LlamaAdapterForConditionalGeneration
) -> list[Computed]:
    """Features in place of pixels."""
    assert model.vision is not None
    if not decoded:
        return []
    device = next(model.vision.parameters()).device
    frames = torch.cat([c.features if c.frames else c.features[None] for c in decoded])
    parts = [
        vision_features(model.vision, some.to(device), model.adapter_config).cpu()
        for some in frames.split(_FRAMES)
    ]
    features = torch.cat(parts).split([max(1, c.frames) for c in decoded])
    return [
        c._replace(features=of if c.frames else of[0])
        for c, of in zip(decoded, features, strict=True)
    ]
