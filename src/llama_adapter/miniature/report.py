"""The demonstration's report: one self-contained HTML page with pictures and curves."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, select_autoescape
from PIL import Image

from llama_adapter.files import write_atomically
from llama_adapter.miniature.measure import CLAIMS
from llama_adapter.miniature.sheet import show

if TYPE_CHECKING:
    from llama_adapter.miniature.demo import DemoResult

SHOWN_PICTURES = 8


def write_report(result: DemoResult, path: Path) -> None:
    """Write the page; nothing in it is fetched from anywhere."""
    environment = Environment(
        loader=PackageLoader("llama_adapter.miniature", "templates"),
        autoescape=select_autoescape(["html", "j2"]),
    )
    page = environment.get_template("report.html.j2").render(
        claims=CLAIMS,
        shipped=result.shipped.to_dict(),
        trained=result.trained.to_dict(),
        summary=result.to_dict(),
        questions=sorted(result.shipped.by_question["C1"]),
        curve=_data_url(_curve(result.school.history.rows)),
        gallery=list(_gallery(result)),
    )
    write_atomically(path, page)


def _gallery(result: DemoResult) -> Iterator[dict[str, Any]]:
    from llama_adapter.miniature.demo import TEST_SEED

    school = result.school
    shown = show(school.model, school.processor, result.test, count=SHOWN_PICTURES, seed=TEST_SEED)
    for index, one in enumerate(shown):
        yield {
            "image": _data_url(_png(one.image)),
            "shipped": result.shipped.captions[index],
            "expert": result.expert_captions[index],
            "trained": result.trained.captions[index],
            "answers": one.answers,
        }


def _curve(rows: list[dict[str, Any]]) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = figure.subplots()
    for kind in ("instruction", "caption"):
        points = [(row["step"], row[kind]) for row in rows if kind in row]
        if points:
            smooth, values = points[0][1], []
            for _, loss in points:
                smooth = 0.95 * smooth + 0.05 * loss
                values.append(smooth)
            axes.plot([step for step, _ in points], values, label=f"{kind} loss")
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.legend()
    axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _data_url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
