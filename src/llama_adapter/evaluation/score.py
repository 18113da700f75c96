"""Numbers from stored answers: no model, no judge, no network."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llama_adapter.errors import EvaluationError
from llama_adapter.evaluation.bootstrap import RESAMPLES, bootstrap_intervals
from llama_adapter.evaluation.judges import WORD_JUDGES
from llama_adapter.evaluation.predictions import PREDICTIONS, Predictions, is_ours, join, read_ours
from llama_adapter.evaluation.records import Tally
from llama_adapter.evaluation.tasks import find_task
from llama_adapter.evaluation.tasks.base import Counting, Inputs, Task


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
        }


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
    found = read_predictions(task, predictions)
    if inputs is not None:
        found = join(found, task.read(inputs), data=inputs.data)
    tally = task.count(found, counting or Counting())
    return report(task, found, tally, resamples=resamples, seed=seed)


def read_predictions(task: Task, path: Path) -> Predictions:
    """Rows from a file or folder of answers in any format that the task knows."""
    if not path.exists():
        raise EvaluationError(f"{path}: no such predictions")
    if (path / PREDICTIONS).is_file():
        path = path / PREDICTIONS
    if path.is_file() and path.stat().st_size == 0:
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
    values = tally.metrics(tally.sums_UC.sum(axis=0))
    metrics = {name: float(value) for name, value in values.items() if not np.isnan(value)}
    intervals = bootstrap_intervals(tally, resamples=resamples, seed=seed)
    protocol = dict(tally.protocol)
    if found.judge is not None:
        protocol["judge"] = found.judge
    if found.judge in WORD_JUDGES:
        # another measure must not bear the published one's name
        metrics = {f"{found.judge}:{k}": v for k, v in metrics.items() if "accuracy" in k}
        intervals = {f"{found.judge}:{k}": v for k, v in intervals.items()}
    return ScoreReport(
        task=task.name,
        n=tally.n,
        unanswered=tally.unanswered,
        unparsed=tally.unparsed,
        unjudged=tally.unjudged,
        metrics={**dict(tally.fixed), **metrics},
        intervals={name: pair for name, pair in intervals.items() if name in metrics},
        notes=(*found.notes, *tally.notes),
        protocol=protocol,
    )
