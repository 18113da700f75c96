"""One table of all runs found, with published numbers; and a gallery of answers."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_adapter.errors import EvaluationError
from llama_adapter.evaluation.jsonfiles import field_of, read_json, read_jsonl
from llama_adapter.evaluation.manifest import MANIFEST, TASKS_WITHOUT_ANSWERS, read_manifest
from llama_adapter.evaluation.predictions import PREDICTIONS, SCORE_FILE
from llama_adapter.evaluation.published import published_for
from llama_adapter.evaluation.score import ScoreReport, read_score, score

COLUMNS = ("task", "system", "metric", "value", "low", "high", "n", "missing", "source")


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A finished or unfinished run on disk."""

    folder: Path
    manifest: dict[str, Any]
    report: ScoreReport
    shown_folder: str
    """The folder's last parts: so many that it tells the run from others of the same report."""
    has_answers: bool = True
    """Whether answers are stored, not the score alone."""

    @property
    def name(self) -> str:
        """The folder, and what answered."""
        model = self.manifest.get("model") or {}
        who = model.get("directory") or model.get("model") or "unknown model"
        return f"{self.shown_folder} ({Path(who).name})"


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One number of the table."""

    task: str
    system: str
    metric: str
    value: float | None
    """None where there is no number: nothing is judged, or answered."""
    interval: tuple[float, float] | None = None
    n: int | None = None
    missing: str = ""
    source: str = ""
    is_published: bool = False


def find_runs(folders: Iterable[Path], *, resamples: int = 1000) -> list[Run]:
    """Every run in or below the folders, scored from its stored answers.

    A run of a task that stores none has the numbers of its score.
    """
    found: dict[Path, Path] = {}  # each once, though folders may lie in one another
    folders = list(folders)
    for folder in folders:
        if not folder.is_dir():
            raise EvaluationError(f"{folder}: no such folder of runs")
        for path in sorted(folder.glob(f"**/{PREDICTIONS}")):
            if _has_answers(path.parent):
                found.setdefault(path.parent.resolve(), path.parent)
        for path in sorted(folder.glob(f"**/{SCORE_FILE}")):
            if path.is_file() and _stores_no_answers(path.parent):
                found.setdefault(path.parent.resolve(), path.parent)
    if not found:
        names = ", ".join(str(folder) for folder in folders)
        raise EvaluationError(
            f"{names} holds no run of `llama-adapter eval`: no {PREDICTIONS}, "
            f"and no {SCORE_FILE} with a {MANIFEST} of {', '.join(TASKS_WITHOUT_ANSWERS)}"
        )
    shown = _told_apart(list(found))
    runs = [_read_run(folder, shown[full], resamples) for full, folder in found.items()]
    return sorted(runs, key=lambda run: (run.report.task, run.shown_folder))


def _has_answers(folder: Path) -> bool:
    path = folder / PREDICTIONS
    return path.is_file() and path.stat().st_size > 0


def _stores_no_answers(folder: Path) -> bool:
    """Whether the folder's manifest is of a task that stores none."""
    path = folder / MANIFEST
    if not path.is_file():
        return False
    try:
        stored = read_json(path)
    except EvaluationError:
        return False  # other programs write files of that name, too
    return isinstance(stored, dict) and stored.get("task") in TASKS_WITHOUT_ANSWERS


def _told_apart(folders: Sequence[Path]) -> dict[Path, str]:
    """The last part of each path, and those before it where others end alike."""
    found = {}
    for folder in folders:
        others = [other for other in folders if other != folder]
        count = 1
        while count < len(folder.parts) and any(
            other.parts[-count:] == folder.parts[-count:] for other in others
        ):
            count += 1
        found[folder] = str(Path(*folder.parts[-count:]))
    return found


def _read_run(folder: Path, shown_folder: str, resamples: int) -> Run:
    manifest = read_manifest(folder)
    if not _has_answers(folder):
        return Run(
            folder=folder,
            manifest=manifest,
            report=read_score(folder / SCORE_FILE),
            shown_folder=shown_folder,
            has_answers=False,
        )
    lines, _ = read_jsonl(folder / PREDICTIONS)
    where = f"{folder / PREDICTIONS}: line 1"
    task = str(field_of(lines[0] if lines else {}, ("task",), where=where))
    found = score(task, folder, resamples=resamples)
    return Run(folder=folder, manifest=manifest, report=found, shown_folder=shown_folder)


def table(runs: Sequence[Run]) -> list[Line]:
    """A line for each number, published ones first within a task."""
    lines = []
    for task in dict.fromkeys(run.report.task for run in runs):
        for row in published_for(task):
            lines += [
                Line(
                    task=task,
                    system=row.system,
                    metric=metric,
                    value=value,
                    source=row.source,
                    is_published=True,
                )
                for metric, value in row.metrics.items()
            ]
        for run in runs:
            if run.report.task == task:
                lines += _lines_of(run)
    return lines


def _lines_of(run: Run) -> list[Line]:
    found = run.report
    counts = {
        "unanswered": found.unanswered,
        "unparsed": found.unparsed,
        "unjudged": found.unjudged,
    }
    missing = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    # a run without any number is in the table too
    values: dict[str, float | None] = {**found.metrics} or {"": None}
    return [
        Line(
            task=found.task,
            system=run.name,
            metric=metric,
            value=value,
            interval=found.intervals.get(metric),
            # only of stored answers is every metric known to be of all records
            n=found.counts.get(metric, found.n if run.has_answers else None),
            missing=missing,
            source=str(run.folder),
        )
        for metric, value in values.items()
    ]


def as_markdown(lines: Sequence[Line]) -> str:
    """A table a task: systems down, metrics across, intervals in brackets."""
    parts = ["# Results", ""]
    for task in dict.fromkeys(line.task for line in lines):
        own = [line for line in lines if line.task == task]
        metrics = list(dict.fromkeys(line.metric for line in own if line.metric))
        parts += [f"## {task}", "", "| system | n | " + " | ".join(metrics) + " | missing |"]
        parts.append("|---|---|" + "---|" * (len(metrics) + 1))
        for system in dict.fromkeys(line.system for line in own):
            mine = {line.metric: line for line in own if line.system == system}
            first = next(iter(mine.values()))
            cells = [_cell(mine.get(metric)) for metric in metrics]
            shown = f"{system} (published)" if first.is_published else system
            counts = {line.n for line in mine.values()}
            count = "" if first.n is None or len(counts) > 1 else str(first.n)
            row = [shown, count, *cells, first.missing]
            parts.append("| " + " | ".join(value.replace("|", "\\|") for value in row) + " |")
        sources = {line.system: line.source for line in own if line.is_published}
        parts += ["", *(f"{system}: {source}." for system, source in sources.items()), ""]
    return "\n".join(parts)


def _cell(line: Line | None) -> str:
    if line is None or line.value is None:
        return ""
    if line.interval is None:
        return f"{line.value:.2f}"
    return f"{line.value:.2f} [{line.interval[0]:.2f}, {line.interval[1]:.2f}]"


def as_csv(lines: Sequence[Line]) -> str:
    """A row a number."""
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(COLUMNS)
    for line in lines:
        low, high = line.interval or ("", "")
        count = "" if line.n is None else line.n
        named = (line.task, line.system, line.metric)
        writer.writerow([*named, line.value, low, high, count, line.missing, line.source])
    return buffer.getvalue()
