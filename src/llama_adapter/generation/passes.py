"""A decoder that runs over rows of one cache, each where it is in its own text.

Shapes: B rows of a pass, T tokens of a pass, P places that it may look at, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from llama_adapter.errors import UnsupportedModelError
from llama_adapter.families.compatibility import ROUGH_TOLERANCE
from llama_adapter.families.offloading import execution_device
from llama_adapter.families.projections import RELATIVE_TOLERANCE, relative_difference
from llama_adapter.families.structure import CACHE, family_of
from llama_adapter.generation.rows import RowCache
from llama_adapter.model.attention_registry import PREFIX
from llama_adapter.model.loss import masked_head
from llama_adapter.model.stack import AdapterStack, RowReads

_SLIDING, _FULL = "sliding_attention", "full_attention"
_UNUSED = (
    "bad_words_ids",
    "begin_suppress_tokens",
    "encoder_repetition_penalty",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "guidance_scale",
    "min_length",
    "min_new_tokens",
    "no_repeat_ngram_size",
    "sequence_bias",
    "suppress_tokens",
)
"""Settings of a base's generation config that change greedy answers and that rows do not know."""


_BASE = RowReads()


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """What a pass computes of one row."""

    start: int
    """How many tokens the row holds already."""
    tokens: Sequence[int]
    reads: RowReads = _BASE


class RowModel:
    """The frozen decoder over a `RowCache`, with the adapters of a stack."""

    def __init__(
        self, language_model: PreTrainedModel, stack: AdapterStack, *, rows: int, length: int
    ) -> None:
        """Refuse, with UnsupportedModelError, a base that cannot run over rows."""
        self._base, self._stack = language_model, stack
        config = language_model.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ())
        if not kinds <= {_SLIDING, _FULL}:
            other = ", ".join(sorted(kinds - {_SLIDING, _FULL}))
            raise UnsupportedModelError(
                f"{family_of(language_model)} cannot answer in rows: it has layers of {other}"
            )
        self._window: int | None = getattr(config, "sliding_window", None)
        if kinds == {_FULL}:
            self._window = None
        self._is_mixed = len(kinds) == 2 and self._window is not None
        current = config._attn_implementation.removeprefix(PREFIX)
        if current not in ("eager", "sdpa"):  # the others do not take a mask of rows
            language_model.set_attn_implementation("sdpa")
            current = "sdpa"
        self._is_eager = current == "eager"
        self.device = execution_device(language_model.get_input_embeddings())
        self.vocabulary = int(config.vocab_size)
        self.cache = RowCache(num_layers=int(config.num_hidden_layers), rows=rows, length=length)
        self.penalty, self.end_ids = _generation_settings(language_model)
        self._check()

    def run(self, first: int, chunks: Sequence[Chunk]) -> Tensor:
        """Logits [B, V] behind the last token of each chunk, of rows from `first` on."""
        counts = [len(chunk.tokens) for chunk in chunks]
        longest = max(counts)
        self.cache.aim(first=first, starts=[chunk.start for chunk in chunks], counts=counts)
        self._stack.select([chunk.reads for chunk in chunks], num_tokens=longest)
        tokens = [[*chunk.tokens, *(0,) * (longest - len(chunk.tokens))] for chunk in chunks]
        place_BT = self.cache.window.place_BT
        inputs: dict[str, Any] = {
            "input_ids": torch.tensor(tokens, device=self.device),
            "position_ids": place_BT.where(place_BT < self.cache.length, 0).to(self.device),
            "attention_mask": self._masks(),
            CACHE: self.cache,
            "use_cache": False,
        }
        if longest == 1:
            logits: Tensor = self._base(**inputs).logits
            return logits[:, -1]
        is_last_BT = torch.arange(longest) == torch.tensor(counts).unsqueeze(1) - 1
        with masked_head(self._base.get_output_embeddings(), is_last_BT) as kept:
            logits = self._base(**inputs, logits_to_keep=kept).logits
        return logits[0]

    def warm_up(self) -> None:
        """Run once, so that the first request finds everything made."""
        self.try_row(0)

    def try_row(self, index: int) -> Tensor:
        """Logits [1, V] behind two tokens of the base in a free row, which holds nothing after."""
        self.cache.rows[index].content = []
        return self.run(index, [Chunk(start=0, tokens=[0, 0])])

    def _masks(self) -> Any:
        windowed = None
        if self._window is not None:
            windowed = self._mask(self._window)
            if not self._is_mixed:
                return windowed
        full = self._mask(None)
        return full if windowed is None else {_FULL: full, _SLIDING: windowed}

    def _mask(self, window: int | None) -> Tensor:
        mask_B1TP = self.cache.window.mask_B1TP(window).to(self.device)
        if not self._is_eager:
            return mask_B1TP
        dtype = self._base.dtype
        added = torch.zeros(mask_B1TP.shape, dtype=dtype, device=self.device)
        return added.masked_fill(~mask_B1TP, torch.finfo(dtype).min)

    @torch.inference_mode()
    def _check(self) -> None:
        """Compare two rows, read in pieces, with the base alone.

        Whatever a family does with its cache, its rows are right or it is refused.
        """
        rows = self._trial_rows()
        try:
            alone = [
                self._base(torch.tensor([row], device=self.device), use_cache=False).logits[0, -1]
                for row in rows
            ]
            self.run(0, [Chunk(start=0, tokens=row[: len(row) // 2]) for row in rows])
            rest = [Chunk(start=len(row) // 2, tokens=row[len(row) // 2 :]) for row in rows]
            together = self.run(0, rest)
        except Exception as error:  # whatever a family does with a cache that it does not know
            raise UnsupportedModelError(
                f"{family_of(self._base)} cannot answer in rows: its cache is not of keys and "
                f"values alone ({' '.join(str(error).split())[:100]})"
            ) from error
        rough = self._base.dtype != torch.float32 or getattr(self._base, "is_quantized", False)
        found = relative_difference(together, torch.stack(alone))
        if not found <= (ROUGH_TOLERANCE if rough else RELATIVE_TOLERANCE):
            raise UnsupportedModelError(
                f"{family_of(self._base)} cannot answer in rows: logits of a row would differ by "
                f"{found:.2g} of their size from those of the base alone"
            )

    def _trial_rows(self) -> list[list[int]]:
        """Two rows of tokens, away from the special ones, which mostly come first."""
        length = 16
        if self._window is not None and self._window < 64:
            length = max(length, self._window + 8)
        first = min(3, self.vocabulary - 1)
        count = max(self.vocabulary - 4, 1)
        tokens = [min(first + i * 7 % count, self.vocabulary - 1) for i in range(length)]
        tokens = tokens[: self.cache.length]
        return [tokens, tokens[::-1][: max(length // 2, 2)]][: len(self.cache.rows)]


def _generation_settings(language_model: PreTrainedModel) -> tuple[float, list[int]]:
    """The penalty on repetition and the ends that a base's own generation config sets."""
    config: Any = language_model.generation_config or GenerationConfig()
    for name in _UNUSED:
        value = getattr(config, name, None)
        if value not in (None, 0, 1.0, [], {}):
            raise UnsupportedModelError(
                f"the generation config of {family_of(language_model)} sets {name}, which rows do "
                "not know: unset it, or answer one request after another"
            )
    ends = config.eos_token_id
    return (
        float(getattr(config, "repetition_penalty", None) or 1.0),
        [ends] if isinstance(ends, int) else list(ends or ()),
    )
