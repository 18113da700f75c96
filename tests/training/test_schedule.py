"""Which kinds a step takes, and how many steps fit into the minutes of a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llama_adapter.data import Kind
from llama_adapter.errors import TrainingError
from llama_adapter.training.callbacks import Callbacks
from llama_adapter.training.joint import JointTrainer
from llama_adapter.training.launch import train
from llama_adapter.training.recipe import OptimizerSection, StreamSection, load_recipe
from llama_adapter.training.schedule import StepBudget, kinds_of, lr_scale

Recipe = Callable[..., Path]


def sections(**changes: dict[str, Any]) -> dict[Kind, StreamSection]:
    source = {"type": "alpaca"}
    return {
        kind: StreamSection.model_validate({"sources": [source], **changes.get(kind, {})})
        for kind in ("caption", "instruction")
    }


class Clock:
    """Moves only where it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_kind_comes_every_nth_step_once_all_have_set_in() -> None:
    streams = sections(caption={"start": 0.25}, instruction={"every": 4})
    plan = [kinds_of(step, 20, streams) for step in range(20)]
    assert plan[:5] == [["instruction"]] * 5
    assert plan[5:9] == [["caption"]] * 3 + [["caption", "instruction"]]
    assert [step for step, kinds in enumerate(plan) if "instruction" in kinds][5:] == [8, 12, 16]


def finish(
    budget: StepBudget, clock: Clock, pace: Callable[[int], float], *, start: int = 0
) -> int:
    step = 0
    while step < budget.steps:
        seconds = pace(step)
        clock.now += seconds
        budget.took(seconds, step=step)
        step += 1
    return step


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_a_run_ends_in_its_minutes_whatever_its_kinds_of_steps_take(share: float) -> None:
    clock = Clock()
    budget = StepBudget(sections(caption={"start": share}), steps=None, minutes=2, clock=clock)
    clock.now += 20  # reading data and models
    # captions begin where the plan says, and make a step three times as long
    steps = finish(budget, clock, lambda step: 0.3 if step >= share * budget.steps else 0.1)
    assert 115 < clock.now - 100 <= 120.5
    assert 0.9 < steps * (share * 0.1 + (1 - share) * 0.3) / 100 < 1.1


def test_evaluations_and_the_last_checkpoint_count() -> None:
    clock = Clock()
    budget = StepBudget(sections(), steps=None, minutes=1, clock=clock)

    def pace(step: int) -> float:
        if step % 20 == 19:
            clock.now += 2
            budget.took_between(2, saving=True)
        return 0.1

    finish(budget, clock, pace)
    assert 54 < clock.now - 100 <= 58.2


def test_an_evaluation_of_an_earlier_process_is_no_cost_of_each_step() -> None:
    """One that was interrupted is made before the first step of the process that resumes."""
    planned = []
    for evaluation in (0, 60):
        clock = Clock()
        budget = StepBudget(sections(), steps=None, minutes=10, clock=clock)
        paces: dict[str, list[float]] = {"some": [], "all": [1.0] * 20}
        budget.load_state_dict({"steps": 530, "spent": 330.0, "saving": 1.0, "paces": paces})
        budget.begin()
        clock.now += evaluation
        budget.took_between(evaluation, saving=False)
        clock.now += 1
        budget.took(1.0, step=399)
        planned.append(budget.steps)
    assert planned[0] - planned[1] == 60


def test_steps_bound_minutes_and_slow_steps_end_in_time() -> None:
    clock = Clock()
    assert (
        finish(StepBudget(sections(), steps=7, minutes=5, clock=clock), clock, lambda _: 0.1) == 7
    )
    clock = Clock()
    slow = StepBudget(sections(), steps=None, minutes=1, clock=clock)
    assert finish(slow, clock, lambda _: 25.0) == 3
    with pytest.raises(TrainingError, match="minutes: 1 are over before the first step"):
        slow.begin()


def test_a_run_by_minutes_goes_on_to_the_bit(
    recipe_file: Recipe, losses: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock that is the same in both: the minutes that were spent are counted."""

    class Stop(Exception):
        pass

    make_step = JointTrainer.step

    def run(out: str, *, stop: int | None = None, resume: bool = False) -> Any:
        clock = Clock()

        def timed(*args: Any, **batches: Any) -> Any:
            clock.now += 0.5
            return make_step(*args, **batches)

        monkeypatch.setattr(JointTrainer, "step", timed)

        def step(row: dict[str, Any]) -> None:
            if row["step"] == stop:
                raise Stop

        recipe = load_recipe(
            recipe_file(steps=None, minutes=0.2, captions__start=0.2, checkpoint_every=4),
            [f"out={tmp_path}/{out}"],
        )
        return train(recipe, resume=resume, callbacks=Callbacks(step=step), clock=clock)

    whole = run("whole")
    assert 20 <= whole.steps <= 25
    with pytest.raises(Stop):
        run("parts", stop=14)
    parts = run("parts", resume=True)
    assert parts.started_at == 12
    assert parts.checksum == whole.checksum
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    state = json.loads((tmp_path / "whole/metrics.jsonl").read_text().splitlines()[-1])
    assert state["steps"] == whole.steps


def test_learning_rates_warm_up_and_end_at_zero() -> None:
    section = OptimizerSection(warmup_steps=10, decay_share=0.5)
    assert lr_scale(section, 0, 100) == pytest.approx(0.1)
    assert lr_scale(section, 30, 100) == 1.0
    assert lr_scale(section, 100, 100) == pytest.approx(0.0, abs=1e-12)
