"""What the rows of a pass read, as the modules of a stack look it up.

Shapes: B rows, T tokens of a pass, E entries of a bank, M prompts of each, K = E·M keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llama_adapter.families.structure import KeysValues


@dataclass(frozen=True, kw_only=True, slots=True)
class RowReads:
    """Which adapter a row uses, and which images its tokens attend to."""

    adapter: int = 0
    """Its index in the stack; 0 is the base."""
    image: int = 0
    """The entry that every token of the row reads; 0 for none."""
    images: Sequence[int] | None = None
    """The entry of each token of the pass, where only placeholders read; in place of `image`."""
    ordinals: Sequence[int] | None = None
    """With `images`, where a placeholder attends to one prompt of its image alone: which."""
    is_late: bool = False
    """Whether an image takes the place of the adapter's static prompts, which it holds."""

    @property
    def static(self) -> int:
        """The entry of static prompts that the row's tokens read."""
        return 0 if self.is_late and self.image else self.adapter


class Selection:
    """Which adapter each row of this pass uses; set by the stack, read by its modules."""

    def __init__(self) -> None:
        self.only: int | None = 0
        """The adapter of all rows, where they have the same one."""
        self._adapters: list[int] = []
        self._gathered: dict[int, Tensor] = {}
        """Rows of tables, by the table: rows of a batch keep their adapters for many passes."""

    def set(self, adapters: Sequence[int]) -> None:
        """Take the adapters of the rows of the next pass."""
        self.only = adapters[0] if len(set(adapters)) == 1 else None
        if self.only is None and adapters != self._adapters:
            self._adapters = list(adapters)
            self.forget()

    def forget(self) -> None:
        """Gather again: tables have changed, or are others."""
        self._gathered = {}

    def rows_of(self, table_AC: Tensor, x: Tensor) -> Tensor:
        """The row of a table for each row of x, which it broadcasts against."""
        if self.only is not None:
            return table_AC[self.only]
        picked = self.gathered(table_AC, len(x))
        return picked.view(len(x), *(1,) * (x.ndim - 2), *picked.shape[1:])

    def gathered(self, table_AC: Tensor, num_rows: int) -> Tensor:
        """The row of a table for each row of a pass; for each token, where a family flattens it."""
        picked = self._gathered.get(id(table_AC))
        if picked is None:
            index_B = torch.tensor(self._adapters, device=table_AC.device)
            picked = self._gathered[id(table_AC)] = table_AC.index_select(0, index_B)
        repeats = num_rows // len(picked)
        return picked if repeats == 1 else picked.repeat_interleave(repeats, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class RowEntries:
    """One entry a row, which all of its tokens read."""

    used: frozenset[int]
    entries_B: Tensor
    only: int | None
    """The entry, where all rows read the same one."""
    length: int
    mask_B11M: Tensor | None
    """Where entries differ in length."""
    gathered: dict[int, KeysValues] = field(default_factory=dict)
    """Keys and values of the rows by layer, kept for the passes in which they stay."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenEntries:
    """An entry for each token, which is 0 where it reads nothing."""

    used: frozenset[int]
    entries_E: Tensor
    mask_B1TK: Tensor
    length: int


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnPrompts:
    """One prompt of an entry for each token."""

    used: frozenset[int]
    entries_BT: Tensor
    ordinals_BT: Tensor


Entries = RowEntries | TokenEntries | OwnPrompts
