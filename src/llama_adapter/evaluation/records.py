"""What every task speaks: records, answers, verdicts, and what they add up to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_adapter.errors import EvaluationError

Floats = NDArray[np.float64]
Verdict = Mapping[str, Any]
"""What a judge said about one aspect of one answer, read from its reply: `{"score": 4}`."""
Metrics = Callable[[Floats], dict[str, Floats]]
"""From totals (..., C) over any set of records to named numbers (...)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One item of a benchmark: what is asked about what, and what is known to be right."""

    id: str
    questions: tuple[str, ...]
    """Usually one; VideoInstruct's consistency asks two."""
    reference: Any = None
    """The right answer in the benchmark's own form; None where it is not on disk."""
    images: tuple[str, ...] = ()
    """Image names as the benchmark's file gives them."""
    video: str | None = None
    """Video name as the benchmark's file gives it."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Category, complexity, choices: whatever the task counts by."""

    @property
    def question(self) -> str:
        """The first question."""
        return self.questions[0]

    def required(self, name: str) -> Any:
        """A fact that counting cannot do without."""
        if self.metadata.get(name) is None:
            raise EvaluationError(
                f"record {self.id[:60]!r} lacks {name}: its answers cannot be counted"
            )
        return self.metadata[name]

    def texts(self, name: str) -> list[str]:
        """A fact that is a list of texts; none where it is absent."""
        found = self.metadata.get(name) or []
        if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
            raise EvaluationError(f"record {self.id[:60]!r}: {name} must be a list of texts")
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One record with what became of it, ready to be counted."""

    record: Record
    answers: tuple[str, ...] = ()
    """One for each question; empty where there is none."""
    verdicts: Mapping[str, Verdict] = field(default_factory=dict)
    """By aspect; an aspect that no judge answered readably is absent."""
    problem: str | None = None
    """Why there is no answer, where a run noted it."""

    @property
    def answer(self) -> str:
        """The first answer, or nothing."""
        return self.answers[0] if self.answers else ""

    @property
    def is_answered(self) -> bool:
        """Whether every question has an answer that is not blank."""
        given = len(self.answers) >= len(self.record.questions)
        return given and all(answer.strip() for answer in self.answers)


@dataclass(frozen=True, kw_only=True)
class Tally:
    """Rows boiled down to sums: whatever a metric needs, it reads from column totals.

    That makes any metric, corpus ones included, cheap to bootstrap: resampling records is
    resampling rows of `sums_UC`.
    """

    n: int
    """Records that were scored."""
    sums_UC: Floats
    """One row for each unit of resampling (a record, an image), one column for each sum."""
    metrics: Metrics
    judged: int | None = None
    """Records with a verdict; None for tasks that count by rule."""
    compared: int = 0
    """Records of a judged task whose answers were compared by words in place of a judge."""
    unanswered: int = 0
    unparsed: int = 0
    unjudged: int = 0
    notes: tuple[str, ...] = ()
    """What a reader must know to read the numbers right."""
    fixed: Mapping[str, float] = field(default_factory=dict)
    """Numbers that are not sums over the rows at hand, and have no interval."""
    protocol: Mapping[str, Any] = field(default_factory=dict)
    """How it was counted, for the record."""


def ratio(numerator: Floats, denominator: Floats) -> Floats:
    """Elementwise quotient; NaN where nothing was counted."""
    out = np.full(np.broadcast(numerator, denominator).shape, np.nan)
    np.divide(numerator, denominator, out=out, where=denominator > 0)
    return out


def table(rows: Sequence[Any] | Floats, *, columns: int) -> Floats:
    """A (U, C) array, also for no rows at all."""
    return np.asarray(rows, dtype=np.float64).reshape(len(rows), columns)
