"""The paper's claims against their alternatives, at equal steps on equal data.

    llama-adapter ablate

Variants differ from the reference in what their names say; with the same seed all of them see
the same batches in the same order. Every finished run is kept, so an interrupted ablation goes on.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from llama_adapter.config import AdapterConfig
from llama_adapter.errors import ConfigError
from llama_adapter.files import atomic_file, read_json_object, write_atomically
from llama_adapter.miniature.bundled import load_decoder, load_tower
from llama_adapter.miniature.course import Course, run_course
from llama_adapter.miniature.demo import TEST_SEED, Stage, shipped_captions
from llama_adapter.miniature.exam import Exam
from llama_adapter.miniature.measure import CLAIMS, measure
from llama_adapter.miniature.pictures import PicturePool
from llama_adapter.miniature.recipes import ABLATION_COURSE
from llama_adapter.miniature.scenes import Split
from llama_adapter.model.references import fingerprint

MOST = 1_000_000
"""Of anything that is counted; an ablation of so much would take years."""
SHOWN = ("C1", "C2", "C3", "C3key", "C4", "C5shuffledkey", "C6")


def _adapted(course: Course, **changes: Any) -> Course:
    settings = {**course.adapter.to_dict(), **changes}
    return replace(course, adapter=AdapterConfig.from_dict(settings))


def variants() -> dict[str, Course]:
    """Every variant by name; the first is the reference."""
    reference = ABLATION_COURSE
    late = {"fusion": "late", "visual_prompt_length": reference.adapter.prompt_length}
    everywhere = {"visual_scope": "all", "placeholder_attention": "all"}
    no_linears = {"bias_targets": "none", "scale_targets": "none"}
    return {
        "reference": reference,
        "slots read all prompts": _adapted(reference, placeholder_attention="all"),
        "naive joint": replace(reference, joint="naive"),
        "scored unfairly": replace(reference, plan=replace(reference.plan, fair=False)),
        "LANGUAGE keeps moving": replace(reference, language_rest=1.0, instruction_every=1),
        "late fusion": _adapted(reference, **late, **everywhere),
        "late fusion, naive joint": replace(
            _adapted(reference, **late, **everywhere), joint="naive"
        ),
        "no bias and scale": _adapted(reference, **no_linears),
        "all tokens attend": _adapted(reference, **everywhere),
        "K = 1": _adapted(reference, visual_layers=1),
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class AblationSettings:
    """How large the ablation is."""

    steps: int = 300
    seeds: tuple[int, ...] = (0, 1, 2)
    pictures: int = 4000
    test_pictures: int = 200
    questions: int = 440
    only: tuple[str, ...] = ()
    """Names of the variants to run; empty: all."""

    def __post_init__(self) -> None:
        counts = {"seeds": len(self.seeds)}
        counts |= {n: getattr(self, n) for n in ("steps", "pictures", "test_pictures", "questions")}
        for name, count in counts.items():
            if not 1 <= count <= MOST:
                raise ConfigError(f"{name} must be from 1 to {MOST}, got {count}")

    def chosen(self) -> dict[str, Course]:
        """The courses to run; ConfigError for an unknown variant."""
        known = variants()
        for name in self.only:
            if name not in known:
                raise ConfigError(f"unknown variant {name!r}; known: {', '.join(known)}")
        names = self.only or tuple(known)
        return {name: replace(known[name], steps=self.steps) for name in names}


def run_ablation(
    settings: AblationSettings, out: Path, *, stage: Stage
) -> dict[str, list[dict[str, Any]]]:
    """Train and measure every variant with every seed; results by variant, one per seed.

    Finished runs are read back from `out`/runs if settings and bases are the same.
    """
    decoder, tower = load_decoder(), load_tower()
    bases = [fingerprint(base) for base in (decoder, tower)]
    test = ABLATION_COURSE.pictures(
        tower,
        count=settings.test_pictures,
        seed=TEST_SEED,
        split=Split.TEST,
        progress=stage("drawing test pictures", settings.test_pictures),
    )
    exam = Exam(test, count=settings.questions)
    expert = shipped_captions(test, decoder=decoder, tower=tower)
    results: dict[str, list[dict[str, Any]]] = {}
    for seed in settings.seeds:
        pool: PicturePool | None = None
        for name, course in settings.chosen().items():
            path = out / "runs" / f"{name.replace(' ', '-').replace(',', '')}-{seed}.json"
            key = {"variant": name, "seed": seed, "steps": settings.steps}
            key |= {"pictures": settings.pictures, "questions": settings.questions}
            key |= {"made_of": _digest(repr((course, bases, expert)))}
            row = _finished(path, key)
            if row is None:
                if pool is None:
                    label = f"drawing pictures, seed {seed}"
                    pool = course.pictures(
                        tower,
                        count=settings.pictures,
                        seed=seed,
                        progress=stage(label, settings.pictures),
                    )
                tick = stage(f"{name}, seed {seed}", settings.steps)
                row = key | _run(course, seed, decoder, tower, pool, exam, expert, tick)
                _write(path, row)
            results.setdefault(name, []).append(row)
    return results


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _run(
    course: Course,
    seed: int,
    decoder: PreTrainedModel,
    tower: nn.Module,
    pool: PicturePool,
    exam: Exam,
    expert: Sequence[str],
    tick: Callable[[int], None],
) -> dict[str, Any]:
    school = run_course(
        course,
        decoder=decoder,
        tower=tower,
        pool=pool,
        seed=seed,
        watch=lambda step, steps, row: tick(1),  # noqa: ARG005
    )
    measured = measure(school.model, school.processor, exam, expert_captions=expert)
    school.model.disable_adapters()
    return {"training_seconds": round(school.history.seconds, 1), **measured.to_dict()}


def _finished(path: Path, key: Mapping[str, Any]) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        row = read_json_object(path, error=ConfigError)
    except ConfigError:  # damaged: it runs again
        return None
    is_same = all(row.get(name) == value for name, value in key.items())
    return row if is_same and all(_is_measured(row[n]) for n in SHOWN if n in row) else None


def _is_measured(claim: Any) -> bool:
    return isinstance(claim, dict) and isinstance(claim.get("value"), int | float)


def _write(path: Path, row: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(row, indent=2) + "\n")


def table(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """A markdown table: mean over seeds, and the spread from lowest to highest."""
    lines = [
        "| variant | " + " | ".join(SHOWN) + " |",
        "|---|" + "---|" * len(SHOWN),
    ]
    for name, rows in results.items():
        cells = []
        for claim in SHOWN:
            values = [100 * row[claim]["value"] for row in rows if claim in row]
            if not values:
                cells.append("–")
                continue
            spread = f" ({min(values):.0f}–{max(values):.0f})" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(results: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Bars per claim and variant, a dot for every seed, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(results)
    for offset, (name, rows) in enumerate(results.items()):
        for position, claim in enumerate(SHOWN):
            values = [100 * row[claim]["value"] for row in rows if claim in row]
            x = position + offset * width
            if values:
                color = f"C{offset}"
                label = name if position == 0 else None
                axes.bar(x, statistics.mean(values), width, color=color, alpha=0.75, label=label)
                axes.plot([x] * len(values), values, ".", color="black", markersize=3)
    axes.set_xticks([i + 0.4 - width / 2 for i in range(len(SHOWN))], SHOWN)
    axes.set_ylabel("% right")
    figure.legend(loc="outside upper center", fontsize="small", ncols=5)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        figure.savefig(file, dpi=120, format="png")


def write_results(
    results: Mapping[str, Sequence[Mapping[str, Any]]], settings: AblationSettings, docs: Path
) -> None:
    """The table, the plot and what they say, as a page and a picture."""
    plot(results, docs / "ablation.png")
    claims = "\n".join(f"- **{name}**: {CLAIMS[name]}" for name in SHOWN)
    only = "".join(f' --only "{name}"' for name in settings.only)
    command = f"llama-adapter ablate --steps {settings.steps} --seeds {len(settings.seeds)}{only}"
    text = (
        "# Ablation\n\n"
        f"Made by `{command}`; "
        f"{settings.steps} steps a run, {len(settings.seeds)} seeds, the same batches in the same "
        "order for every variant of a seed. Percent right on held-out scenes: the mean over "
        "seeds, and the lowest and highest.\n\n"
        f"{table(results)}\n{claims}\n\n![the same as bars](ablation.png)\n"
    )
    write_atomically(docs / "ablation-results.md", text)
