"""What is done to a micro-batch between the data and the model: channels dropped, rows split.

Shape suffixes: B rows, I images, P patches, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from llama_adapter.data.batch import PER_IMAGE
from llama_adapter.families.vision import vision_features
from llama_adapter.model import LlamaAdapterForConditionalGeneration

PASS_IN_TOKENS = 200
"""About so many tokens could be computed in the time that one more pass takes (on a CPU)."""


def with_features(
    batch: Mapping[str, Tensor], model: LlamaAdapterForConditionalGeneration
) -> dict[str, Tensor]:
    """The batch with features of its images in place of their pixels."""
    inputs = dict(batch)
    pixels = inputs.pop("pixel_values", None)
    if pixels is not None and model.vision is not None:
        device = next(model.vision.parameters()).device
        inputs["visual_features"] = vision_features(
            model.vision, pixels.to(device), model.adapter_config
        )
    return inputs


def drop_channels(batch: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Set a share of each image's feature channels to zero, the same ones for all its patches.

    What is read off single channels then counts less. Draws from the global random state.
    """
    features = batch.get("visual_features")
    if features is None or not share:
        return dict(batch)
    shape = (len(features), *[1] * (features.ndim - 2), features.shape[-1])
    # on the CPU: the same channels whatever the device
    kept = (torch.rand(shape) >= share).to(features.device)
    return {**batch, "visual_features": features * kept / (1 - share)}


def split_by_length(batch: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Padded rows in two parts, short and long, or in one where that saves no time.

    Their losses and gradients add up to the whole batch's: what is left out is padding.
    """
    if batch["attention_mask"].ndim > 2:  # samples with branches
        return [dict(batch)]
    lengths_B, order_B = batch["attention_mask"].sum(1).sort(stable=True)
    lengths = lengths_B.tolist()
    size, longest = len(lengths), lengths[-1]
    tokens = {
        cut: cut * lengths[cut - 1] + (size - cut) * longest
        for cut in range(1, size)
        if lengths[cut - 1] > 1  # rows of unreadable samples are empty
    }
    cut = min(tokens, key=tokens.__getitem__, default=size)
    if cut == size or tokens[cut] + PASS_IN_TOKENS > size * longest:
        return [dict(batch)]
    return [_rows(batch, order_B[:cut], lengths[cut - 1]), _rows(batch, order_B[cut:], longest)]


def _rows(batch: Mapping[str, Tensor], rows: Tensor, length: int) -> dict[str, Tensor]:
    """Some rows without the padding that all of them have, and the images they read."""
    part = {
        name: x[rows] if x.ndim == 1 else x[rows, :length]
        for name, x in batch.items()
        if name not in PER_IMAGE
    }
    index = part.get("image_index")
    if index is None:
        return part
    used = index[index >= 0].unique()
    if not len(used):
        for name in ("image_index", "visual_mask"):
            part.pop(name, None)
        return part
    part["image_index"] = torch.where(index >= 0, torch.searchsorted(used, index), -1)
    return part | {name: x[used] for name, x in batch.items() if name in PER_IMAGE}
