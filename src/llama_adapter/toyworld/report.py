"""The demonstration's report: one self-contained HTML page with pictures and curves."""

from __future__ import annotations

import base64
import io
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, select_autoescape
from PIL import Image

from llama_adapter.generation.chat import ChatSession, GenerationSettings
from llama_adapter.toyworld.exam import UNSEEN
from llama_adapter.toyworld.measure import CLAIMS
from llama_adapter.toyworld.pictures import picture
from llama_adapter.toyworld.questions import QUESTION_TYPES, ask

if TYPE_CHECKING:
    from llama_adapter.toyworld.demo import DemoResult

SHOWN_PICTURES = 8
PICTURE_SIZE = 192


def write_report(result: DemoResult, path: Path) -> None:
    """Write the page; nothing in it is fetched from anywhere."""
    environment = Environment(
        loader=PackageLoader("llama_adapter.toyworld", "templates"),
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
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(page)
    temporary.replace(path)


def _gallery(result: DemoResult) -> Any:
    from llama_adapter.toyworld.demo import TEST_SEED

    session = ChatSession(
        result.school.model,
        result.school.processor,
        settings=GenerationSettings(max_new_tokens=72),
    )
    rng = random.Random("gallery")
    kinds = [kind for kind in QUESTION_TYPES if kind not in UNSEEN]
    for index in range(min(SHOWN_PICTURES, len(result.test))):
        scene = result.test.scenes[index]
        image = picture(scene, seed=TEST_SEED, index=index, size=PICTURE_SIZE)
        seen = picture(scene, seed=TEST_SEED, index=index)
        asked = [a for kind in rng.sample(kinds, 5) if (a := ask(scene, rng, kind)) is not None]
        answers = []
        for question in asked[:3]:
            session.reset()
            answer = session.ask(question.question, images=[seen]).text
            answers.append((question.question, answer, question.answer))
        yield {
            "image": _data_url(_png(image)),
            "shipped": result.shipped.captions[index],
            "expert": result.expert_captions[index],
            "trained": result.trained.captions[index],
            "answers": answers,
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
