"""What a run measured, drawn: one PNG, and one self-contained HTML page."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from html import escape
from itertools import islice
from pathlib import Path
from typing import Any

from llama_adapter.errors import TrainingError
from llama_adapter.files import MAX_YAML_BYTES, read_text, write_atomically
from llama_adapter.training.metrics import Row
from llama_adapter.training.run_directory import METRICS, RECIPE, rows_of_steps

PNG, HTML = "plot.png", "plot.html"
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:1100px;padding:0 1rem;color:#222}
img{max-width:100%}table{border-collapse:collapse}td,th{border-bottom:1px solid #ddd;
padding:.3rem .7rem;text-align:left}td.n{text-align:right;font-variant-numeric:tabular-nums}
pre{background:#f6f6f6;padding:1rem;overflow-x:auto;font-size:12px}"""
_POINTS = 2000
"""At most so many points of a curve are drawn."""

_MOST_SERIES = 500
_NAME = re.compile(r"[\w./:@ -]{1,100}", re.ASCII)
"""What a curve may be called; matplotlib reads a formula from other characters."""
_LARGEST = 1e300

Series = tuple[str, list[int], list[float]]


def plot_run(
    run: Path, out: Path | None = None, *, say: Callable[[str], None] = lambda _message: None
) -> list[Path]:
    """Draw a run's losses, scores, gates, gradients, rates and throughput.

    `say` gets a sentence about lines that were left out. Raises TrainingError where the directory
    holds no run, nothing was measured yet, or the files cannot be written.
    """
    metrics = rows_of_steps(run / METRICS)
    rows = list(metrics.rows())
    if not rows:
        raise TrainingError(
            f"{run} is not a run of `llama-adapter train`: no {METRICS} with a row in it"
        )
    if metrics.invalid:
        say(f"{metrics.path}: {metrics.invalid} lines are not rows and are left out")
    out = run if out is None else out
    png = _draw(rows, title=_shown(run.name).replace("$", r"\$"))
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / PNG, png)
        write_atomically(out / HTML, _page(run, rows, png))
    except OSError as error:
        raise TrainingError(f"cannot write into {out}: {error.strerror}") from error
    return [out / PNG, out / HTML]


def _shown(text: str) -> str:
    """A name with its odd bytes escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


def _draw(rows: Sequence[Row], *, title: str) -> bytes:
    from matplotlib.figure import Figure

    held_out = list(_series(rows, "held_out/"))
    panels: list[tuple[str, list[Series], Callable[[Any], None]]] = [
        ("loss (smoothed)", [_smooth(s) for s in _series(rows, "loss/")], _log_scale),
        ("held-out perplexity", [s for s in held_out if s[0].endswith(".perplexity")], _log_scale),
        ("held-out captions", [s for s in held_out if not s[0].endswith(".perplexity")], _plain),
        ("gates, mean magnitude by layer", list(_series(rows, "gate/")), _plain),
        ("gradient norm by group", list(_series(rows, "grad_norm/")), _log_scale),
        ("learning rate", list(_series(rows, "lr/")), _plain),
        ("tokens per second", [_smooth(s) for s in _throughput(rows)], _from_zero),
        ("answer tokens per step", list(_series(rows, "answer_tokens/")), _from_zero),
    ]
    figure = Figure(figsize=(13, 14), layout="constrained")
    figure.suptitle(title)
    for axes, (name, series, scale) in zip(figure.subplots(4, 2).flat, panels, strict=True):
        axes.set_title(name)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        colors = _colors(len(series))
        for (label, steps, values), color in zip(series, colors, strict=True):
            marker = "o" if len(steps) < 30 else None
            axes.plot(steps, values, label=label, color=color, marker=marker, markersize=3)
        if series:
            scale(axes)
            axes.legend(fontsize=7, ncols=1 + len(series) // 12)
        else:
            axes.text(0.5, 0.5, "none", ha="center", va="center", transform=axes.transAxes)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def _colors(count: int) -> list[Any]:
    from matplotlib import colormaps

    if count <= 10:
        return [colormaps["tab10"](index) for index in range(count)]
    # many layers: their order is what matters
    return [colormaps["viridis"](index / (count - 1)) for index in range(count)]


def _log_scale(axes: Any) -> None:
    """Logarithmic, if such an axis can show every value."""
    values = [value for line in axes.get_lines() for value in line.get_ydata()]
    if min(values) > 0 and max(values) > 3 * min(values):
        axes.set_yscale("log")


def _from_zero(axes: Any) -> None:
    axes.set_ylim(bottom=0)


def _plain(_axes: Any) -> None:
    pass


def _series(rows: Sequence[Row], prefix: str) -> Iterable[Series]:
    found = (n for row in rows for n in row if n.startswith(prefix) and _NAME.fullmatch(n))
    names = list(islice(dict.fromkeys(found), _MOST_SERIES))
    for name in sorted(names, key=_natural) if prefix == "gate/" else names:
        points = [(row["step"], float(row[name])) for row in rows if _is_number(row.get(name))]
        if points:
            thin = points[:: max(1, len(points) // _POINTS)]
            yield name.removeprefix(prefix), [s for s, _ in thin], [v for _, v in thin]


def _is_number(value: Any) -> bool:
    """Whether a curve can go through it; a loss that was not finite is null."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and abs(value) < _LARGEST


def _natural(name: str) -> list[tuple[int, str]]:
    """Layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _throughput(rows: Sequence[Row]) -> Iterable[Series]:
    # the first step also warms up
    points = [
        (row["step"], row["tokens"] / row["seconds"])
        for row in rows[1:]
        if _is_number(row.get("tokens"))
        and _is_number(row.get("seconds"))
        and row["seconds"] > 1e-6
    ]
    if points:
        thin = points[:: max(1, len(points) // _POINTS)]
        yield "tokens/s", [s for s, _ in thin], [v for _, v in thin]


def _smooth(series: Series) -> Series:
    """An exponential mean over about a fiftieth of the curve."""
    name, steps, values = series
    keep = 1 - 1 / max(1.0, len(values) / 50)
    smoothed, mean = [], values[0]
    for value in values:
        mean = keep * mean + (1 - keep) * value
        smoothed.append(mean)
    return name, steps, smoothed


def _page(run: Path, rows: Sequence[Row], png: bytes) -> str:
    name = escape(_shown(run.name))
    image = base64.b64encode(png).decode()
    try:
        shown = escape(read_text(run / RECIPE, error=TrainingError, limit=MAX_YAML_BYTES))
    except TrainingError as error:
        shown = f"({escape(_shown(str(error)))})"
    skipped = [str(row["step"]) for row in rows if row.get("skipped")]
    notes = f"<p>Skipped steps: {', '.join(skipped)}</p>" if skipped else ""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{name}'
        f"</title><style>{_STYLE}</style></head><body><h1>{name}</h1>"
        f'<img alt="curves" src="data:image/png;base64,{image}">{notes}'
        f"<h2>First and last values</h2>{_table(rows)}<h2>Recipe</h2><pre>{shown}</pre>"
        "</body></html>\n"
    )


def _table(rows: Sequence[Row]) -> str:
    lines = []
    for prefix in ("loss/", "held_out/", "grad_norm/", "gate/"):
        for name, _, values in _series(rows, prefix):
            lines.append(
                f"<tr><td>{escape(prefix + name)}</td>"
                f'<td class="n">{values[0]:.4g}</td><td class="n">{values[-1]:.4g}</td></tr>'
            )
    return f"<table><tr><th></th><th>first</th><th>last</th></tr>{''.join(lines)}</table>"
