"""Numbers from stored answers: no model, no judge, no network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llama_adapter.errors import EvaluationError
from llama_adapter.evaluation.bootstrap import RESAMPLES, bootstrap_intervals
from llama_adapter.evaluation.jsonfiles import MAX_BYTES, brief, field_of, read_json
from llama_adapter.evaluation.judges import WORD_JUDGES
from llama_adapter.evaluation.predictions import (
    PREDICTIONS,
    Predictions,
    is_ours,
    join,
    number,
    read_ours,
)
from llama_adapter.evaluation.records import Tally
from llama_adapter.evaluation.tasks import find_task
from llama_adapter.evaluation.tasks.base import Counting, Inputs, Task
from llama_adapter.files import open_regular


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreReport:
    """What `score` prints."""

    task: str
    n: int
    unanswered: int
    unparsed: int
    unjudged: int
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    notes: tuple[str, ...] = ()
    protocol: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    """Of how many each metric is a share, where they are not all of `n`."""

    def as_json(self) -> dict[str, Any]:
        """The one object of `--json`."""
        return {
            "task": self.task,
            "n": self.n,
            "unanswered": self.unanswered,
            "unparsed": self.unparsed,
            "unjudged": self.unjudged,
            "metrics": self.metrics,
            "intervals": {name: list(pair) for name, pair in self.intervals.items()},
            "notes": list(self.notes),
            "protocol": self.protocol,
            **({"counts": self.counts} if self.counts else {}),
        }


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _are_numbers(values: Any) -> bool:
    return all(isinstance(one, int | float) and number(one) is not None for one in values)


_STORED: dict[str, Callable[[Any], bool]] = {
    "task": lambda name: isinstance(name, str),
    "n": _is_count,
    "unanswered": _is_count,
    "unparsed": _is_count,
    "unjudged": _is_count,
    "metrics": lambda named: isinstance(named, dict) and _are_numbers(named.values()),
    "intervals": lambda named: (
        isinstance(named, dict)
        and all(isinstance(e, list) and len(e) == 2 and _are_numbers(e) for e in named.values())
    ),
    "notes": lambda notes: isinstance(notes, list) and all(isinstance(n, str) for n in notes),
    "protocol": lambda protocol: isinstance(protocol, dict),
    "counts": lambda named: isinstance(named, dict) and all(map(_is_count, named.values())),
}
"""What a report is read from, and whether a value is as a run writes it."""


def read_score(path: Path) -> ScoreReport:
    """The report that a run has stored, for tasks whose answers are not."""
    stored = read_json(path)
    if not isinstance(stored, dict):
        raise EvaluationError(f"{path}: is not a score: {brief(stored)}")
    found = {}
    for name, fits in _STORED.items():
        if name == "counts" and name not in stored:
            continue  # as where every metric is of all records
        found[name] = field_of(stored, (name,), where=str(path))
        if not fits(found[name]):
            raise EvaluationError(f"{path}: {name} is not as a run writes it: {brief(found[name])}")
    intervals = {name: (low, high) for name, (low, high) in found.pop("intervals").items()}
    notes = tuple(found.pop("notes"))
    return ScoreReport(**found, intervals=intervals, notes=notes)


def score(
    task_name: str,
    predictions: Path,
    *,
    inputs: Inputs | None = None,
    counting: Counting | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> ScoreReport:
    """Score stored answers: ours, or a public result file's.

    With `inputs` the answers are joined with the benchmark's own records: what is missing is
    counted as unanswered, what is unknown is noted. Intervals are 95% percentile bootstrap.
    """
    task = find_task(task_name)
    found = read_joined(task, predictions, inputs)
    tally = task.count(found, counting or Counting())
    return report(task, found, tally, resamples=resamples, seed=seed)


def read_joined(task: Task, predictions: Path, inputs: Inputs | None) -> Predictions:
    """Stored answers, joined with the benchmark's own records where these are given."""
    found = read_predictions(task, predictions)
    return found if inputs is None else join(found, task.read(inputs), data=inputs.data)


def read_predictions(task: Task, path: Path) -> Predictions:
    """Rows from a file or folder of answers in any format that the task knows."""
    if not path.exists():
        raise EvaluationError(f"{path}: no such predictions")
    if (path / PREDICTIONS).is_file():
        path = path / PREDICTIONS
    if not path.is_dir():
        with open_regular(path, error=EvaluationError, limit=MAX_BYTES) as file:
            if not file.read(1):
                raise EvaluationError(f"{path}: is empty, expected predictions of {task.name}")
    if path.is_file() and is_ours(path):
        parse = task.judging.parse if task.judging else None
        found = read_ours(path, task=task.name, parse=parse)
    else:
        found = task.read_public(path)
    if not found.rows:
        raise EvaluationError(f"{path}: holds no predictions of {task.name}")
    return found


def report(
    task: Task, found: Predictions, tally: Tally, *, resamples: int = RESAMPLES, seed: int = 0
) -> ScoreReport:
    """Metrics that have a value, their intervals and everything that was odd."""
    is_answered = any(row.is_answered for row in found.rows)
    is_counted = tally.compared > 0 if tally.judged == 0 else is_answered
    metrics: dict[str, float] = {}
    intervals: dict[str, tuple[float, float]] = {}
    if is_counted:
        values = tally.metrics(tally.sums_UC.sum(axis=0))
        metrics = {name: float(value) for name, value in values.items() if not np.isnan(value)}
        intervals = bootstrap_intervals(tally, resamples=resamples, seed=seed)
    protocol = dict(tally.protocol)
    if found.judge is not None:
        protocol["judge"] = found.judge
    if found.judge in WORD_JUDGES and not tally.compared:
        # another measure must not bear the published one's name
        metrics = {f"{found.judge}:{k}": v for k, v in metrics.items() if "accuracy" in k}
        intervals = {f"{found.judge}:{k}": v for k, v in intervals.items()}
    return ScoreReport(
        task=task.name,
        n=tally.n,
        unanswered=tally.unanswered,
        unparsed=tally.unparsed,
        unjudged=tally.unjudged,
        metrics={**dict(tally.fixed), **metrics} if is_counted else {},
        intervals={name: pair for name, pair in intervals.items() if name in metrics},
        notes=(*found.notes, *tally.notes, *_missing(task, tally, is_answered=is_answered)),
        protocol=protocol,
    )


def _missing(task: Task, tally: Tally, *, is_answered: bool) -> tuple[str, ...]:
    """What there is no number for, and which command helps."""
    if not is_answered:
        return (f"none of the {tally.n} records is answered, so there is no number",)
    if tally.judged is None or not tally.unjudged:
        return ()
    how = (
        f"llama-adapter eval {task.name} --predictions FILE --out DIR --judge-url URL "
        "--judge-model NAME judges stored answers"
    )
    if tally.judged == 0:
        return (f"no answer is judged, so the published measure has no number; {how}",)
    return (
        f"{tally.unjudged} of {tally.n} records are answered and have no verdict that can be read "
        f"and is on its scale; {how}",
    )
