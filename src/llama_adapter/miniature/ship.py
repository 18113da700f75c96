"""Make the shipped adapters again: V2 by the live demonstration's recipe with a larger budget.

    python -m llama_adapter.miniature.ship v2 --out DIR
    python -m llama_adapter.miniature.ship caption --out DIR

Data of a step depend on seed and step alone, and checkpoints hold everything that moves: a run
that was killed and started again with --resume ends with the very numbers of one that was not.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from llama_adapter.checkpoints.torch_files import read_torch_file
from llama_adapter.errors import CheckpointError
from llama_adapter.files import atomic_file, parse_json
from llama_adapter.miniature.bundled import load_decoder, load_tower
from llama_adapter.miniature.course import Class
from llama_adapter.miniature.exam import Exam, score_captions, write_captions
from llama_adapter.miniature.measure import CLAIMS, Measured, measure
from llama_adapter.miniature.recipes import COURSES
from llama_adapter.miniature.scenes import Split

DEVELOPMENT_SEED = 10_000
"""Seed of the scenes that progress is measured on; the demonstration uses others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShipSettings:
    """Everything that decides the outcome of a run."""

    name: str
    """A name in `recipes.COURSES`."""
    steps: int
    seed: int = 0
    pictures: int = 24_000
    checkpoint_every: int = 200
    measure_every: int = 1000
    test_pictures: int = 200
    questions: int = 330


class Shipment:
    """One run: a class that can be put away and taken up again."""

    def __init__(self, settings: ShipSettings) -> None:
        self.settings = settings
        course = replace(COURSES[settings.name], steps=settings.steps)
        self.decoder, self.tower = load_decoder(), load_tower()
        self.pool = course.pictures(self.tower, count=settings.pictures, seed=settings.seed)
        self.school = Class(
            course,
            decoder=self.decoder,
            tower=self.tower,
            pool=self.pool,
            seed=settings.seed,
        )
        test = course.pictures(
            self.tower, count=settings.test_pictures, seed=DEVELOPMENT_SEED, split=Split.TEST
        )
        self.exam = Exam(test, count=settings.questions, seed=DEVELOPMENT_SEED)

    def save(self, path: Path) -> None:
        """Write a checkpoint; a crash leaves the previous one whole."""
        state = {
            "settings": {"name": self.settings.name, "steps": self.settings.steps},
            "adapter": self.school.model.adapter.state_dict(),
            "trainer": self.school.trainer.state_dict(),
            "rows": json.dumps(self.school.history.rows),
        }
        with atomic_file(path) as file:
            torch.save(state, file)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint; CheckpointError if it is damaged or another run's."""
        state = read_torch_file(path)
        expected = {"name": self.settings.name, "steps": self.settings.steps}
        if not isinstance(state, dict) or set(state) != {"settings", "adapter", "trainer", "rows"}:
            raise CheckpointError(f"{path} is not a checkpoint of this program")
        if state["settings"] != expected:
            raise CheckpointError(f"{path} is of a run {state['settings']}, this one is {expected}")
        self.school.model.adapter.load_state_dict(state["adapter"], source=str(path))
        self.school.trainer.load_state_dict(state["trainer"])
        rows = parse_json(state["rows"], name=f"rows of {path}", error=CheckpointError)
        self.school.history.rows = rows

    def measure(self) -> Measured:
        """The claims on development scenes; captions alone where nothing else was learnt."""
        school = self.school
        if school.course.instructions:
            return measure(school.model, school.processor, self.exam)
        captions = write_captions(school.model, school.processor, self.exam.pool.features_NPC)
        total, by_things = score_captions(captions, self.exam.pool)
        return Measured(claims={"C2": total}, by_things={"C2": by_things}, captions=captions)

    def export(self, out: Path) -> None:
        """Write the adapter with its processor, as users load it."""
        self.school.model.save_pretrained(out)
        self.school.processor.save_pretrained(out)


def run(settings: ShipSettings, out: Path, *, resume: bool) -> Shipment:
    """Train to the end, with checkpoints, and export to `out`/adapter."""
    out.mkdir(parents=True, exist_ok=True)
    shipment = Shipment(settings)
    checkpoint = out / "checkpoint.pt"
    if resume and checkpoint.exists():
        shipment.load(checkpoint)
        print(f"resumed at step {shipment.school.trainer.step_count}", flush=True)  # noqa: T201
    while not shipment.school.is_over:
        row = shipment.school.step()
        step = shipment.school.trainer.step_count
        if step % 50 == 0:
            seconds = shipment.school.history.seconds
            print(f"{row} {seconds:.0f}s", flush=True)  # noqa: T201
        if step % settings.checkpoint_every == 0:
            shipment.save(checkpoint)
        if step % settings.measure_every == 0 or shipment.school.is_over:
            found = shipment.measure().claims
            print({name: round(s.value, 3) for name, s in found.items()}, flush=True)  # noqa: T201
    shipment.save(checkpoint)
    shipment.export(out / "adapter")
    return shipment


def main(arguments: Sequence[str] | None = None) -> None:
    """Train a shipped adapter from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m llama_adapter.miniature.ship",
        description="Train one of the shipped adapters. "
        + "; ".join(f"{name}: {text}" for name, text in CLAIMS.items()),
    )
    parser.add_argument("name", choices=sorted(COURSES))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, help="by default the recipe's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pictures", type=int, default=24_000)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    settings = ShipSettings(
        name=options.name,
        steps=options.steps or COURSES[options.name].steps,
        seed=options.seed,
        pictures=options.pictures,
    )
    run(settings, options.out, resume=options.resume)


if __name__ == "__main__":
    main()
