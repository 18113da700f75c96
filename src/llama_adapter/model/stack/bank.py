"""Keys and gated values of prompts, ready to be attended to.

Shapes: B rows, T tokens, H query heads, D head size, S entries, M prompts of each,
E entries that a pass uses, K = E·M.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor
from torch.nn import functional as F

from llama_adapter.families.structure import KeysValues
from llama_adapter.model.fast.attention import attention as attend
from llama_adapter.model.stack.reads import (
    Entries,
    OwnPrompts,
    RowEntries,
    RowReads,
    TokenEntries,
)


class PromptBank:
    """A fixed number of entries, each the prompts that some rows read, layer by layer.

    An entry adds nothing in a layer that it was not given; entry 0 adds nothing anywhere. Tables
    grow when a layer is first used or longer prompts come, never during a pass.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.size = size
        self.device = device
        self._tables: dict[int, KeysValues] = {}
        self._holders: dict[int, set[int]] = {}
        """Which entries add something in a layer."""
        self._lengths = [0] * size
        self._longest = 0
        self._rows: tuple[list[int], RowEntries] | None = None
        """What the rows of the last mixed pass read, until an entry changes."""

    def put(self, entry: int, prompts: Mapping[int, KeysValues]) -> None:
        """Fill an entry with keys and gated values [H, M, D] by layer."""
        self.clear(entry)
        for layer, (keys, values) in prompts.items():
            self._lengths[entry] = keys.shape[1]
            tables = self._fitting(layer, keys, values)
            for table, new in zip(tables, (keys, values), strict=True):
                table[entry, :, : new.shape[1]] = new
            self._holders[layer].add(entry)

    def clear(self, entry: int) -> None:
        """Let an entry add nothing."""
        self._rows = None
        for layer, holders in self._holders.items():
            if entry in holders:
                for table in self._tables[layer]:
                    table[entry] = 0
                holders.remove(entry)
        self._lengths[entry] = 0

    def _fitting(self, layer: int, keys_HMD: Tensor, values_HMD: Tensor) -> KeysValues:
        self._longest = max(self._longest, keys_HMD.shape[1])
        if layer not in self._tables:
            keys_SHMD, values_SHMD = (
                new.new_zeros(self.size, new.shape[0], self._longest, new.shape[2])
                for new in (keys_HMD, values_HMD)
            )
            self._tables[layer], self._holders[layer] = (keys_SHMD, values_SHMD), set()
        for other, (keys_SHMD, values_SHMD) in self._tables.items():  # one mask fits all layers
            if missing := self._longest - keys_SHMD.shape[2]:
                self._tables[other] = (
                    F.pad(keys_SHMD, (0, 0, 0, missing)),
                    F.pad(values_SHMD, (0, 0, 0, missing)),
                )
        return self._tables[layer]

    # --- what the rows of a pass read -------------------------------------------------------

    def of_rows(self, entries: Sequence[int]) -> RowEntries | None:
        """One entry a row; None where no row reads anything."""
        if self._rows is not None and self._rows[0] == entries:
            return self._rows[1]
        used = frozenset(entries)
        if used == {0}:
            return None
        length = max(self._lengths[entry] for entry in used)
        mask = None
        if any(0 < self._lengths[entry] < length for entry in used):
            # entry 0 may attend to all of its values, which are 0
            mask = self._within([self._lengths[entry] or length for entry in entries], length)
            mask = mask[:, None, None]
        found = RowEntries(
            used=used,
            entries_B=torch.tensor(entries, device=self.device),
            only=entries[0] if len(used) == 1 else None,
            length=length,
            mask_B11M=mask,
        )
        if found.only is None:  # there is nothing to gather otherwise
            self._rows = list(entries), found
        return found

    def of_tokens(self, rows: Sequence[RowReads], num_tokens: int) -> list[Entries]:
        """What each token reads, where that differs within rows; all other tokens read entry 0."""
        shared = [_padded([] if r.ordinals else r.images or (), num_tokens) for r in rows]
        own = [_padded(r.images or () if r.ordinals else (), num_tokens) for r in rows]
        found: list[Entries] = []
        if any(map(any, shared)):
            found.append(self._shared(shared))
        if any(map(any, own)):
            ordinals = [_padded(r.ordinals or (), num_tokens) for r in rows]
            found.append(
                OwnPrompts(
                    used=frozenset(chain(*own)),
                    entries_BT=torch.tensor(own, device=self.device),
                    ordinals_BT=torch.tensor(ordinals, device=self.device),
                )
            )
        return found

    def _shared(self, entries: list[list[int]]) -> TokenEntries:
        used = sorted({0, *chain(*entries)})
        length = max(self._lengths[entry] for entry in used)
        entries_E = torch.tensor(used, device=self.device)
        entries_BT = torch.tensor(entries, device=self.device)
        within_EM = self._within([self._lengths[entry] or length for entry in used], length)
        mask_BTEM = (entries_BT[:, :, None] == entries_E)[..., None] & within_EM
        return TokenEntries(
            used=frozenset(used),
            entries_E=entries_E,
            mask_B1TK=mask_BTEM.flatten(2).unsqueeze(1),
            length=length,
        )

    def _within(self, lengths: list[int], length: int) -> Tensor:
        place_M = torch.arange(length, device=self.device)
        return place_M < torch.tensor(lengths, device=self.device)[:, None]

    # --- attention --------------------------------------------------------------------------

    def read(
        self,
        layer: int,
        query_BHTD: Tensor,
        reads: Entries,
        *,
        scale: float,
        softcap: float | None,
    ) -> Tensor | None:
        """What the entries add in a layer, [B, H, T, D]; None for nothing."""
        if layer not in self._tables or self._holders[layer].isdisjoint(reads.used):
            return None
        tables = self._tables[layer]
        if isinstance(reads, OwnPrompts):
            return _own_prompts(tables[1], reads).to(query_BHTD.device)
        if isinstance(reads, RowEntries):
            mask = reads.mask_B11M
            if layer not in reads.gathered:
                reads.gathered[layer] = _picked(tables, reads, query_BHTD)
            keys, values = reads.gathered[layer]
        else:
            mask = reads.mask_B1TK
            keys, values = (
                x.transpose(0, 1).flatten(1, 2).unsqueeze(0)
                for x in _picked(tables, reads, query_BHTD)
            )
        if mask is not None:
            mask = mask.to(query_BHTD.device)
        return attend(query_BHTD, keys, values, mask=mask, scale=scale, softcap=softcap)


def _padded(values: Sequence[int], length: int) -> list[int]:
    return [*values, *(0,) * (length - len(values))]


def _picked(tables: KeysValues, reads: RowEntries | TokenEntries, like: Tensor) -> KeysValues:
    """The entries that a pass uses, on the device and in the dtype of its queries."""

    def pick(table_SHMD: Tensor) -> Tensor:
        table_SHMD = table_SHMD[:, :, : reads.length]
        if isinstance(reads, RowEntries) and reads.only is not None:
            return table_SHMD[reads.only : reads.only + 1].to(like)
        entries = reads.entries_B if isinstance(reads, RowEntries) else reads.entries_E
        return table_SHMD.index_select(0, entries.to(table_SHMD.device)).to(like)

    return pick(tables[0]), pick(tables[1])


def _own_prompts(values_SHMD: Tensor, reads: OwnPrompts) -> Tensor:
    """A softmax over one key is 1, whatever the key; past an image's prompts the values are 0."""
    entries_BT = reads.entries_BT.to(values_SHMD.device)
    ordinals_BT = reads.ordinals_BT.to(values_SHMD.device)
    inside_BT = ordinals_BT < values_SHMD.shape[2]
    own_BTHD = values_SHMD[
        entries_BT.where(inside_BT, 0), :, ordinals_BT.clamp(max=values_SHMD.shape[2] - 1)
    ]
    return own_BTHD.transpose(1, 2)
