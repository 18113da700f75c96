"""What a run measured, drawn: one PNG, and one HTML page that needs nothing beside itself."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from llama_adapter.errors import TrainingError
from llama_adapter.training.measures import Row
from llama_adapter.training.run_directory import METRICS, RECIPE, RunDirectory, write_whole

PNG, HTML = "plot.png", "plot.html"
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:1100px;padding:0 1rem;color:#222}
img{max-width:100%}table{border-collapse:collapse}td,th{border-bottom:1px solid #ddd;
padding:.3rem .7rem;text-align:left}td.n{text-align:right;font-variant-numeric:tabular-nums}
pre{background:#f6f6f6;padding:1rem;overflow-x:auto;font-size:12px}"""
_POINTS = 2000
"""At most so many points of a curve are drawn."""

Series = tuple[str, list[int], list[float]]


def plot_run(run: Path, out: Path | None = None) -> list[Path]:
    """Draw a run's losses, scores, gates, gradients, rates and throughput.

    Raises TrainingError where the directory holds no run or nothing was measured yet.
    """
    rows = list(RunDirectory(run).rows())
    if not rows:
        raise TrainingError(f"{run} has no {METRICS} with a row in it")
    out = run if out is None else out
    out.mkdir(parents=True, exist_ok=True)
    png = _draw(rows, title=run.name)
    write_whole(out / PNG, png)
    write_whole(out / HTML, _page(run, rows, png).encode())
    return [out / PNG, out / HTML]


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
        colours = _colours(len(series))
        for (label, steps, values), colour in zip(series, colours, strict=True):
            marker = "o" if len(steps) < 30 else None
            axes.plot(steps, values, label=label, color=colour, marker=marker, markersize=3)
        if series:
            scale(axes)
            axes.legend(fontsize=7, ncols=1 + len(series) // 12)
        else:
            axes.text(0.5, 0.5, "none", ha="center", va="center", transform=axes.transAxes)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def _colours(count: int) -> list[Any]:
    from matplotlib import colormaps

    if count <= 10:
        return [colormaps["tab10"](index) for index in range(count)]
    # many layers: their order is what matters
    return [colormaps["viridis"](index / (count - 1)) for index in range(count)]


def _log_scale(axes: Any) -> None:
    """Logarithmic, if every value can stand on such an axis."""
    values = [value for line in axes.get_lines() for value in line.get_ydata()]
    if min(values) > 0 and max(values) > 3 * min(values):
        axes.set_yscale("log")


def _from_zero(axes: Any) -> None:
    axes.set_ylim(bottom=0)


def _plain(_axes: Any) -> None:
    pass


def _series(rows: Sequence[Row], prefix: str) -> Iterable[Series]:
    names = dict.fromkeys(name for row in rows for name in row if name.startswith(prefix))
    for name in sorted(names, key=_natural) if prefix == "gate/" else names:
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        if points:
            thin = points[:: max(1, len(points) // _POINTS)]
            yield name.removeprefix(prefix), [s for s, _ in thin], [v for _, v in thin]


def _natural(name: str) -> list[tuple[int, str]]:
    """Layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _throughput(rows: Sequence[Row]) -> Iterable[Series]:
    # the first step also warms up
    points = [(r["step"], r["tokens"] / r["seconds"]) for r in rows[1:] if r.get("seconds")]
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
    picture = base64.b64encode(png).decode()
    recipe = run / RECIPE
    shown = escape(recipe.read_text()) if recipe.exists() else "(no recipe)"
    skipped = [str(row["step"]) for row in rows if row.get("skipped")]
    notes = f"<p>Skipped steps: {', '.join(skipped)}</p>" if skipped else ""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(run.name)}'
        f"</title><style>{_STYLE}</style></head><body><h1>{escape(run.name)}</h1>"
        f'<img alt="curves" src="data:image/png;base64,{picture}">{notes}'
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
