"""The demonstration: what the shipped adapters can do, then a fresh one trained live.

    llama-adapter demo

Everything that is measured is measured on held-out scenes, for both, by the same exam.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from llama_adapter.errors import ConfigError
from llama_adapter.files import write_atomically
from llama_adapter.miniature.bundled import load_bundled, load_decoder, load_tower
from llama_adapter.miniature.course import Class, run_course
from llama_adapter.miniature.exam import Exam, write_captions
from llama_adapter.miniature.measure import Measured, measure
from llama_adapter.miniature.pictures import PicturePool
from llama_adapter.miniature.recipes import LIVE_COURSE
from llama_adapter.miniature.scenes import Split
from llama_adapter.model import Group

TEST_SEED = 20_000
"""Seed of test pictures; training pictures are drawn from the run's own seed."""

ON_SHEET = 4
"""Pictures on the sheet beside the report."""

Stage = Callable[[str, int], Callable[[int], None]]
"""Opens a progress bar (label, total); what it returns takes the number of things just done."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoSettings:
    """How long the demonstration takes and what it looks at."""

    minutes: float = 6.0
    """For drawing, looking and training the fresh adapter."""
    seed: int = 0
    pictures: int = 6000
    """Training pictures."""
    test_pictures: int = 400
    questions: int = 660
    threads: int | None = None
    """CPU threads; None: torch's choice."""

    def __post_init__(self) -> None:
        if not self.minutes > 0:
            raise ConfigError(f"minutes must be more than 0, got {self.minutes}")

    @classmethod
    def quick(cls, *, seed: int) -> DemoSettings:
        """One minute of training, a smaller exam."""
        return cls(minutes=1.0, seed=seed, pictures=1500, test_pictures=150, questions=220)


@dataclass(kw_only=True, slots=True)
class DemoResult:
    """What the demonstration found out."""

    shipped: Measured
    trained: Measured
    school: Class
    test: PicturePool
    exam: Exam
    expert_captions: list[str]
    seconds: float
    settings: DemoSettings

    def to_dict(self) -> dict[str, Any]:
        """The content of `results.json`."""
        model = self.school.model
        return {
            "shipped": self.shipped.to_dict(),
            "trained": self.trained.to_dict(),
            "seconds": round(self.seconds, 1),
            "training_seconds": round(self.school.history.seconds, 1),
            "steps": self.school.history.steps,
            "trainable": {
                group.value: sum(p.numel() for p in model.group_parameters(group))
                for group in Group
            },
            "seed": self.settings.seed,
            "versions": {
                name: version(name) for name in ("llama-adapter", "torch", "transformers")
            },
        }


def run_demo(settings: DemoSettings, *, stage: Stage) -> DemoResult:
    """Measure the shipped adapters, train a fresh one, measure it too."""
    started = time.perf_counter()
    with _threads(settings.threads):
        decoder, tower = load_decoder(), load_tower()
        test = LIVE_COURSE.pictures(
            tower,
            count=settings.test_pictures,
            seed=TEST_SEED,
            split=Split.TEST,
            progress=stage("drawing test pictures", settings.test_pictures),
        )
        exam = Exam(test, count=settings.questions)
        tick = stage("measuring the shipped adapters", 2)
        expert_captions = shipped_captions(test, decoder=decoder, tower=tower)
        tick(1)
        model, model_processor = load_bundled("v2", language_model=decoder, vision=tower)
        shipped = measure(model, model_processor, exam, expert_captions=expert_captions)
        model.disable_adapters()
        tick(1)
        training_started = time.perf_counter()
        pool = LIVE_COURSE.pictures(
            tower,
            count=settings.pictures,
            seed=settings.seed,
            progress=stage("drawing training pictures", settings.pictures),
        )
        spent = time.perf_counter() - training_started
        school = _train(settings, decoder, tower, pool, spent, stage)
        tick = stage("measuring the fresh adapter", 1)
        trained = measure(school.model, school.processor, exam, expert_captions=expert_captions)
        tick(1)
    return DemoResult(
        shipped=shipped,
        trained=trained,
        school=school,
        test=test,
        exam=exam,
        expert_captions=expert_captions,
        seconds=time.perf_counter() - started,
        settings=settings,
    )


def _train(
    settings: DemoSettings, decoder: Any, tower: Any, pool: PicturePool, spent: float, stage: Stage
) -> Class:
    seconds = max(5.0, settings.minutes * 60 - spent)
    tick = stage("training a fresh adapter (seconds)", round(seconds))
    shown = 0.0
    began = time.perf_counter()

    def watch(step: int, steps: int, row: dict[str, Any]) -> None:  # noqa: ARG001
        nonlocal shown
        now = time.perf_counter() - began
        if int(now) > int(shown):
            tick(int(now) - int(shown))
            shown = now

    return run_course(
        replace(LIVE_COURSE, steps=100_000),
        decoder=decoder,
        tower=tower,
        pool=pool,
        seed=settings.seed,
        seconds=seconds,
        watch=watch,
    )


def shipped_captions(test: PicturePool, *, decoder: Any, tower: Any) -> list[str]:
    """What the shipped caption expert says about each test picture."""
    model, processor = load_bundled("caption", language_model=decoder, vision=tower)
    captions = write_captions(model, processor, test.features_NPC)
    model.disable_adapters()
    return captions


def save_demo(result: DemoResult, out: Path) -> None:
    """Write `results.json`, `report.html`, the loss curve, the fresh adapter, and what the
    shipped one says of some test pictures.
    """
    from llama_adapter.miniature.report import write_report
    from llama_adapter.miniature.sheet import show, write_sheet

    out.mkdir(parents=True, exist_ok=True)
    adapter = out / "adapter"
    result.school.model.save_pretrained(adapter)
    result.school.processor.save_pretrained(adapter)
    rows = "".join(json.dumps(row) + "\n" for row in result.school.history.rows)
    for name, text in (
        ("metrics.jsonl", rows),
        ("results.json", json.dumps(result.to_dict(), indent=2) + "\n"),
    ):
        write_atomically(out / name, text)
    write_report(result, out / "report.html")
    model, processor = load_bundled("v2")
    shown = show(model, processor, result.test, count=ON_SHEET, seed=TEST_SEED)
    write_sheet(tuple(shown), out / "pictures.png")


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
