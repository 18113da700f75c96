"""The report as one HTML file: tables, a plot a task, and answers with their images."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

from llama_adapter.errors import EvaluationError, ImageError, VideoError
from llama_adapter.evaluation.media import MediaFolders, is_there, media_of
from llama_adapter.evaluation.predictions import number, score_of
from llama_adapter.evaluation.records import Row
from llama_adapter.evaluation.report import Line, Run, as_csv, as_markdown, table
from llama_adapter.evaluation.score import read_predictions
from llama_adapter.evaluation.tasks import find_task
from llama_adapter.files import write_atomically
from llama_adapter.processing.images import load_image
from llama_adapter.processing.video import VIDEO_SUFFIXES, load_video

SHOWN = 4
"""Answers of each kind in the gallery."""
_THUMBNAIL = (200, 200)
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:1100px;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0}td,th{border-bottom:1px solid #ddd;padding:.3rem .7rem;
text-align:left;vertical-align:top}td.n{text-align:right;font-variant-numeric:tabular-nums}
tr.published{color:#777}.card{border:1px solid #ddd;border-radius:6px;padding:.7rem;margin:.5rem;
display:inline-block;width:300px;vertical-align:top}.card img{max-width:100%}
.wrap{overflow-x:auto}small{color:#666}"""


def write_report(runs: Sequence[Run], out: Path) -> list[Path]:
    """`report.md`, `report.csv` and a self-contained `report.html`."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EvaluationError(f"{out}: cannot hold a report: {error.strerror}") from error
    lines = table(runs)
    contents = {
        "report.md": as_markdown(lines),
        "report.csv": as_csv(lines),
        "report.html": as_html(lines, runs),
    }
    for name, content in contents.items():
        write_atomically(out / name, content)
    return [out / name for name in contents]


def as_html(lines: Sequence[Line], runs: Sequence[Run]) -> str:
    """A page that needs nothing else."""
    body = ["<h1>Results</h1>"]
    for task in dict.fromkeys(line.task for line in lines):
        own = [line for line in lines if line.task == task]
        body += [f"<h2>{escape(task)}</h2>", _plot(own), _table(own)]
        for run in runs:
            if run.report.task == task:
                body += [_notes(run), _gallery(run) if run.has_answers else ""]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Results</title>'
        f"<style>{_STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )


def _table(lines: Sequence[Line]) -> str:
    rows = []
    for line in lines:
        kind = ' class="published"' if line.is_published else ""
        span = "" if line.interval is None else f"[{line.interval[0]:.2f}, {line.interval[1]:.2f}]"
        cells = [line.system, line.metric]
        value = "" if line.value is None else f"{line.value:.2f}"
        numbers = [value, span, "" if line.n is None else str(line.n)]
        rows.append(
            f"<tr{kind}>"
            + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
            + "".join(f'<td class="n">{escape(cell)}</td>' for cell in numbers)
            + f"<td>{escape(line.missing)}</td><td><small>{escape(line.source)}</small></td></tr>"
        )
    head = "".join(
        f"<th>{name}</th>"
        for name in ("system", "metric", "value", "95%", "n", "missing", "source")
    )
    return f'<div class="wrap"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _plot(lines: Sequence[Line]) -> str:
    """Each number as a dot with its interval, published ones hollow; each metric on its scale."""
    height, left, width = 20, 420, 560
    placed = [(line, line.value) for line in lines if line.value is not None]
    tops: dict[str, float] = {}
    for line, value in placed:
        end = abs(line.interval[1] if line.interval else value)
        tops[line.metric] = max(tops.get(line.metric, 0.0), end)
    marks = []
    ordered = sorted(placed, key=lambda pair: list(tops).index(pair[0].metric))
    for row, (line, value) in enumerate(ordered):
        y = row * height + 14
        scale = width / (tops[line.metric] or 1.0)
        label = escape(f"{line.metric}  {line.system}"[:60])
        marks.append(f'<text x="{left - 8}" y="{y + 4}" text-anchor="end">{label}</text>')
        if line.interval is not None:
            low, high = (left + max(0.0, end) * scale for end in line.interval)
            marks.append(f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}" stroke="#48a"/>')
        fill = "#fff" if line.is_published else "#48a"
        x = left + max(0.0, value) * scale
        marks.append(f'<circle cx="{x:.1f}" cy="{y}" r="4" fill="{fill}" stroke="#48a"/>')
    size = f'viewBox="0 0 {left + width + 20} {len(ordered) * height + 10}"'
    return f'<svg {size} font-size="11" role="img">{"".join(marks)}</svg>'


def _notes(run: Run) -> str:
    rule = (run.manifest.get("frames") or {}).get("rule")
    notes = [*run.report.notes, *([f"frame rule: {rule}"] if rule else [])]
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f"<h3>{escape(run.name)}</h3>" + (f"<ul>{items}</ul>" if items else "")


def quality(row: Row) -> float | None:
    """How good an answer was judged, for sorting; None where nobody could say."""
    every = {"low": -math.inf, "high": math.inf}
    scores = [score_of(verdict, **every) for verdict in row.verdicts.values()]
    scores += [number(verdict.get("score_2")) for verdict in row.verdicts.values()]
    known = [value for value in scores if value is not None]
    return sum(known) / len(known) if known else None


def _gallery(run: Run) -> str:
    rows = read_predictions(find_task(run.report.task), run.folder).rows
    judged = sorted(
        ((value, row) for row in rows if (value := quality(row)) is not None),
        key=lambda pair: -pair[0],
    )
    unjudged = [(None, row) for row in rows if quality(row) is None]
    kinds: dict[str, list[tuple[float | None, Row]]] = {
        "Best": [*judged[:SHOWN]],
        "Worst": [*judged[max(SHOWN, len(judged) - SHOWN) :]],
        "Unjudged" if judged else "Answers": [*unjudged[:SHOWN]],
    }
    data = Path(run.manifest.get("data") or ".")
    folders = MediaFolders.around(data) if is_there(data) else MediaFolders([])
    parts = []
    for kind, chosen in kinds.items():
        if chosen:
            cards = "".join(_card(value, row, folders) for value, row in chosen)
            parts.append(f"<h4>{kind}</h4>{cards}")
    return "".join(parts)


def _card(value: float | None, row: Row, folders: MediaFolders) -> str:
    paths, missing = media_of(row.record, folders)
    images = "".join(f'<img alt="" src="{url}">' for url in map(_thumbnail, paths) if url)
    absent = f"<small>missing: {escape(', '.join(missing))}</small>" if missing else ""
    answer = " / ".join(row.answers) or f"({row.problem or 'no answer'})"
    score = "" if value is None else f"<br><b>score</b> {value:g}"
    return (
        f'<div class="card">{images}{absent}<br><b>{escape(row.record.id)}</b> '
        f"{escape(' / '.join(row.record.questions))}<br><b>answer</b> {escape(answer[:600])}"
        f"<br><b>known</b> {escape(str(row.record.reference)[:400])}{score}</div>"
    )


def _thumbnail(path: Path) -> str | None:
    """A small JPEG as a data URL; None where the file cannot be shown."""
    try:
        if path.suffix.lower() in VIDEO_SUFFIXES:
            image = load_video(path, frames=1).frames[0]
        else:
            image = load_image(path)
    except (ImageError, VideoError):
        return None
    image.thumbnail(_THUMBNAIL)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
