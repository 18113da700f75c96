"""Pictures drawn once and looked at once: scenes with the frozen tower's features of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor, nn

from llama_adapter.config import AdapterConfig
from llama_adapter.families.vision import vision_features
from llama_adapter.miniature.rendering import SceneImage
from llama_adapter.miniature.scenes import Scene, Split, scene_stream
from llama_adapter.processing.processor import LlamaAdapterProcessor

Progress = Callable[[int], None]
"""Called with the number of things just done."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PicturePool:
    """Scenes and the features of their pictures; training never runs the tower again."""

    scenes: tuple[Scene, ...]
    features_NPC: Tensor
    """float16: the tower is frozen, and half of the memory is plenty."""
    strange: tuple[bool, ...]
    """Which pictures are in colours without a name; nothing may be said of their colours."""

    def __len__(self) -> int:
        return len(self.scenes)

    def features(self, indices: Sequence[int]) -> Tensor:
        """Features of some pictures, in float32."""
        return self.features_NPC[torch.as_tensor(indices)].float()


def picture(
    scene: Scene, *, seed: int, index: int, size: int = 64, strange: bool = False
) -> Image.Image:
    """The picture of a scene; the same one for the same seed and index, at any size."""
    return SceneImage(scene=scene, seed=seed, index=index, size=size, unnamed_colors=strange)()


def make_pool(
    vision: nn.Module,
    processor: LlamaAdapterProcessor,
    config: AdapterConfig,
    *,
    count: int,
    seed: int,
    split: Split,
    strange_share: float = 0.0,
    progress: Progress | None = None,
    batch_size: int = 128,
) -> PicturePool:
    """Draw `count` scenes of a split and look at each once.

    In pictures with named colours these tell shapes apart: nothing green is ever a circle
    in training. In the strange share of the pictures they cannot.
    """
    stream = scene_stream(seed, split=split)
    scenes = tuple(next(stream) for _ in range(count))
    rng = random.Random(f"strange/{seed}")
    strange = tuple(rng.random() < strange_share for _ in range(count))
    chunks = []
    for start in range(0, count, batch_size):
        part = range(start, min(start + batch_size, count))
        images = [picture(scenes[i], seed=seed, index=i, strange=strange[i]) for i in part]
        pixels = processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
        chunks.append(vision_features(vision, pixels, config).half())
        if progress is not None:
            progress(len(part))
    return PicturePool(scenes=scenes, features_NPC=torch.cat(chunks), strange=strange)
