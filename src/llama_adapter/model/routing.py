"""The visual prompts of a pass, which tokens attend to which of them, and what a generation keeps.

Shapes: B batch, T tokens of this pass, S tokens that an input covers, I images, M prompts of each,
d hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from llama_adapter.errors import ConfigError
from llama_adapter.families.structure import KeysValues
from llama_adapter.model.places import of_this_pass


@dataclass(frozen=True, kw_only=True, slots=True)
class Routing:
    """Which image each token attends to."""

    image_BT: Tensor
    """Its index, -1 for none; [B, 1] where all tokens of a row attend to the same."""
    row_B: Tensor | None = None
    """The one image of each row, -1 for none, where no row has several."""
    ordinal_BT: Tensor | None = None
    """Where a placeholder attends to one prompt of its image alone: which."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VisualPrompts:
    """The visual prompts of images, for one pass or for a whole generation."""

    prompts_IMd: Tensor
    routing: Routing | None = None
    """None: every token of row i attends to image i."""
    cache: dict[int, KeysValues] | None = None
    """Keys and gated values per layer, made once for a whole generation."""

    def routed(self, routing: Routing | None) -> VisualPrompts:
        """The same prompts, attended to by other tokens."""
        return replace(self, routing=routing)

    def __deepcopy__(self, memo: dict[int, Any]) -> VisualPrompts:
        return self  # never changed; transformers copies what it hands to an assistant


def route(
    *,
    num_images: int,
    num_rows: int,
    num_tokens: int,
    image_index: Tensor | None,
    visual_mask: Tensor | None,
    one_to_one: bool,
    cache: Any,
) -> Routing | None:
    """The routing of a pass from `image_index` ([B] or [B, S]) and `visual_mask` [B, S].

    `one_to_one`: the i-th placeholder of an image attends to its i-th prompt alone.
    Raises ConfigError where that would be a guess.
    """
    if image_index is None and num_images != num_rows:
        raise ConfigError(
            f"{num_images} images for {num_rows} rows: image_index must say which row reads which"
        )

    def here(said_BS: Tensor, name: str) -> Tensor:
        return of_this_pass(said_BS, num_tokens=num_tokens, cache=cache, name=name)

    row_B, image_BT = None, None
    if image_index is not None and image_index.ndim == 2:
        image_BT = here(image_index, "image_index")
    elif image_index is not None:
        row_B, image_BT = image_index, image_index.unsqueeze(1)
    if visual_mask is None:
        return None if image_BT is None else Routing(image_BT=image_BT, row_B=row_B)
    if image_BT is None:
        row_B = torch.arange(num_rows, device=visual_mask.device)
        image_BT = row_B.unsqueeze(1)
    ordinal_BT = None
    if one_to_one:
        by_token = image_index if row_B is None else None
        ordinal_BS = _ordinals(visual_mask, by_token, num_tokens=num_tokens, cache=cache)
        ordinal_BT = here(ordinal_BS, "visual_mask")
    mask_BT = here(visual_mask, "visual_mask").to(image_BT.device)
    image_BT = torch.where(mask_BT, image_BT, -1)
    return Routing(image_BT=image_BT, row_B=row_B, ordinal_BT=ordinal_BT)


def _ordinals(mask_BS: Tensor, image_BS: Tensor | None, *, num_tokens: int, cache: Any) -> Tensor:
    """The how manieth placeholder of its image each is; ConfigError where earlier ones may count.

    A pass that begins among placeholders needs a mask of all tokens so far.
    """
    if mask_BS.shape[1] == num_tokens and _begins_among_placeholders(cache, mask_BS):
        raise ConfigError(
            "placeholder_attention is 'own': a pass must not begin with a placeholder behind "
            "cached tokens: they are counted from the first; give visual_mask for all tokens so "
            "far, or all placeholders of an image in one pass"
        )
    if image_BS is not None and image_BS.shape[1] != mask_BS.shape[1]:
        raise ConfigError(
            f"image_index covers {image_BS.shape[1]} tokens and visual_mask {mask_BS.shape[1]}: "
            "they must cover the same"
        )
    return _places_in_runs(mask_BS, image_BS)


def _begins_among_placeholders(cache: Any, mask_BT: Tensor) -> bool:
    """Whether a pass begins with one behind cached tokens, which may be of the same run."""
    if cache is None or torch.compiler.is_compiling():
        return False
    return bool(cache.get_seq_length() > 0 and mask_BT[:, 0].any())


def _places_in_runs(mask_BS: Tensor, image_BS: Tensor | None) -> Tensor:
    """How many tokens of the same run of placeholders come before each, for whole runs.

    A run is a sequence of placeholders of one image: counting begins again with each image.
    """
    if image_BS is not None:
        image_BS = image_BS.to(mask_BS.device)
        mask_BS = mask_BS & (image_BS >= 0)
    goes_on_BS = mask_BS[:, 1:] & mask_BS[:, :-1]
    if image_BS is not None:
        goes_on_BS = goes_on_BS & (image_BS[:, 1:] == image_BS[:, :-1])
    begins_BS = torch.cat([torch.ones_like(mask_BS[:, :1]), ~goes_on_BS], dim=1)
    place_S = torch.arange(mask_BS.shape[1], device=mask_BS.device)
    start_BS = (place_S * begins_BS).cummax(1).values
    return place_S - start_BS
