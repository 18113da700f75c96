"""The tensors of a batch: what a model's forward takes, from encoded conversations and images.

Shape suffixes: B rows, T tokens, I images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama_adapter.config import IGNORE_INDEX
from llama_adapter.errors import PromptError
from llama_adapter.processing.encoding import Encoded, Side, pad


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedSample:
    """A conversation, or a part of one, that is ready for a row."""

    encoded: Encoded
    id: str = ""
    pixels: Tensor | None = None
    """Images [I, 3, H, W], videos [I, F, 3, H, W]; None without any, and where features are."""
    features: Tensor | None = None
    """What the vision encoder made of them, [I, P, C] or [I, F, P, C]."""

    @property
    def num_images(self) -> int:
        """How many images it shows."""
        return sum(len(of) for of in (self.pixels, self.features) if of is not None)


def make_batch(
    rows: Sequence[Sequence[EncodedSample]],
    *,
    filling: int,
    length: int,
    placeholders_only: bool,
    side: Side = "right",
    labels: bool = True,
    packed: bool = False,
) -> dict[str, Tensor]:
    """Keyword arguments of the model's forward for rows of samples, filled up to `length`.

    `packed` rows hold several samples, which restarting `position_ids` tell apart; others have an
    `attention_mask`. Where a sample has branches there are both, the mask as [B, 1, T, T] (bool,
    true where a token is seen). With images there is `image_index`: [B] where a row shows one image
    at most, else [B, T]; and `visual_mask` [B, T] where placeholders alone attend to images.
    """

    def padded(values_of: Callable[[EncodedSample], Sequence[int]], value: int) -> Tensor:
        values = [[v for sample in row for v in values_of(sample)] for row in rows]
        return pad(values, value=value, side=side, length=length)

    inputs = {"input_ids": padded(lambda s: s.encoded.input_ids, filling)}
    if is_branched := any(sample.encoded.branches for row in rows for sample in row):
        inputs["attention_mask"] = _branch_mask(rows, length)
    if packed or is_branched:
        inputs["position_ids"] = _positions(rows, length)
    else:
        inputs["attention_mask"] = padded(lambda s: (1,) * len(s.encoded), 0)
    if labels:
        inputs["labels"] = padded(lambda s: s.encoded.labels, IGNORE_INDEX)
    samples = [sample for row in rows for sample in row]
    if pixels := [sample.pixels for sample in samples if sample.pixels is not None]:
        inputs["pixel_values"] = join_images(pixels, still=4)
    if features := [sample.features for sample in samples if sample.features is not None]:
        inputs["visual_features"] = join_images(features, still=3)
    if pixels or features:
        numbered = _image_indices(samples, placeholders_only=placeholders_only)
        inputs["image_index"] = padded(lambda _: next(numbered), -1)
        if placeholders_only:
            inputs["visual_mask"] = padded(lambda s: s.encoded.placeholders, -1) >= 0
        if not packed and all(sum(s.num_images for s in row) <= 1 for row in rows):
            # an index for each row is the cheaper form, where it says the same
            inputs["image_index"] = inputs["image_index"].amax(dim=1)
    return inputs


def _positions(rows: Sequence[Sequence[EncodedSample]], length: int) -> Tensor:
    """Positions that restart at every sample; the padding behind them is one more sample."""
    positions = torch.zeros(len(rows), length, dtype=torch.int64)
    for index, row in enumerate(rows):
        known = [position for sample in row for position in sample.encoded.positions]
        positions[index] = torch.tensor([*known, *range(length - len(known))])
    return positions


def _branch_mask(rows: Sequence[Sequence[EncodedSample]], length: int) -> Tensor:
    """[B, 1, T, T], true where a token sees another: earlier, of the same sample, and of its own
    branch or of what all branches begin with.
    """
    samples, branches = torch.full((2, len(rows), length), -1)
    for index, row in enumerate(rows):
        numbers = [number for sample in row for number in sample.encoded.branch_numbers]
        owners = [number for number, sample in enumerate(row) for _ in sample.encoded.input_ids]
        branches[index, : len(numbers)] = torch.tensor(numbers)
        samples[index, : len(owners)] = torch.tensor(owners)
    is_same = samples[:, :, None] == samples[:, None]
    is_open = (branches[:, None] == 0) | (branches[:, :, None] == branches[:, None])
    return (is_same & is_open).tril().unsqueeze(1)


def _image_indices(
    samples: Sequence[EncodedSample], *, placeholders_only: bool
) -> Iterator[list[int]]:
    """For each sample and each of its tokens the image in the batch it attends to, -1 for none."""
    first = 0
    for sample in samples:
        if not placeholders_only:
            yield [first if sample.num_images else -1] * len(sample.encoded)
        else:
            yield [-1 if p < 0 else first + p for p in sample.encoded.placeholders]
        first += sample.num_images


def join_images(images: Sequence[Tensor], *, still: int) -> Tensor:
    """Images of several samples in one tensor; next to videos [I, F, ...] with as many frames.

    `still` is the number of dimensions without frames. PromptError where numbers of frames, or
    sizes, differ.
    """
    frames = max((i.shape[1] for i in images if i.ndim > still), default=0)
    if frames:
        images = [
            i if i.ndim > still else i[:, None].expand(-1, frames, *i.shape[1:]) for i in images
        ]
    if len(shapes := {tuple(i.shape[1:]) for i in images}) > 1:
        raise PromptError(f"a batch must hold images of one shape, got {sorted(shapes)}")
    return torch.cat(list(images))
