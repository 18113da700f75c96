"""An evaluation that Ctrl-C or SIGTERM interrupts is left, and made when the run resumes."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.training.workers import SECONDS, finish, start, words, words_then_interrupted

from llama_adapter.model.persistence import ADAPTER_WEIGHTS_NAME
from llama_adapter.training.callbacks import Callbacks
from llama_adapter.training.launch import train
from llama_adapter.training.parallel import SingleProcess
from llama_adapter.training.recipe import load_recipe

Recipe = Callable[..., Path]
BOTH = ("captions", "instructions")


class Stop(Exception):
    """A death between two steps."""


def evaluated(recipe_file: Recipe, kinds: Sequence[str] = BOTH, **changes: Any) -> Path:
    """A recipe whose sources of these kinds are evaluated after every second of six steps."""
    plain = yaml.safe_load(recipe_file().read_text())
    sources = {f"{kind}__sources": [{**plain[kind]["sources"][0], "held_out": 9}] for kind in kinds}
    return recipe_file(
        **sources,
        **{"steps": 6, "checkpoint_every": 1000, "compute__threads": 1, **changes},
        evaluation={"every": 2, "samples": 9, "max_new_tokens": 3, "best": "pairs.words"},
    )


def interrupting(*numbers: int) -> Callable[..., Mapping[str, float]]:
    """Scores captions, of which some evaluations are interrupted, counted from 1."""
    calls = itertools.count(1)

    def score(captions: Any, references: Any) -> Mapping[str, float]:
        if next(calls) in numbers:  # texts are scored after captions
            os.kill(os.getpid(), signal.SIGTERM)
        return words(captions, references)

    return score


def interrupted(path: Path, *, by: int, resume: bool = False) -> None:
    with pytest.raises(SystemExit, match="143"):
        train(load_recipe(path), resume=resume, score_captions=interrupting(by))


def steps(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    return [row["step"] for row in rows]


def best(run: Path) -> bytes:
    return (run / "best" / ADAPTER_WEIGHTS_NAME).read_bytes()


@pytest.mark.parametrize("number", [1, 3], ids=["first", "last"])
def test_it_is_made_on_resume(
    recipe_file: Recipe, losses: Any, tmp_path: Path, number: int
) -> None:
    path = evaluated(recipe_file)
    run, other = tmp_path / "run", tmp_path / "whole"
    whole = train(load_recipe(path, [f"out={other}"]), score_captions=words)
    interrupted(path, by=number)
    assert steps(losses(run)) == [*range(1, 2 * number)]
    scored: list[int] = []

    def count(captions: Any, references: Any) -> Mapping[str, float]:
        scored.append(len(captions))
        return words(captions, references)

    for evaluations in (4 - number, 0):  # once more changes nothing
        scored.clear()
        resumed = train(load_recipe(path), resume=True, score_captions=count)
        assert len(scored) == evaluations
        assert resumed.checksum == whole.checksum
        assert losses(run) == losses(other)
        assert best(run) == best(other)


@pytest.mark.parametrize("checkpoint_every", [2, 1000])
def test_it_may_be_interrupted_again_and_the_run_may_die(
    recipe_file: Recipe, losses: Any, tmp_path: Path, checkpoint_every: int
) -> None:
    path = evaluated(recipe_file, checkpoint_every=checkpoint_every)
    run, other = tmp_path / "run", tmp_path / "whole"
    whole = train(load_recipe(path, [f"out={other}"]), score_captions=words)
    interrupted(path, by=1)
    [checkpoint] = (run / "checkpoints").iterdir()
    written = checkpoint.stat().st_ino
    interrupted(path, by=1, resume=True)
    assert steps(losses(run)) == [1]

    def die(row: Any) -> None:
        if row["step"] == 3:
            raise Stop

    with pytest.raises(Stop):
        train(load_recipe(path), resume=True, callbacks=Callbacks(step=die), score_captions=words)
    assert steps(losses(run)) == [1, 2, 3]
    assert checkpoint.stat().st_ino == written  # what a run goes on from is not replaced
    resumed = train(load_recipe(path), resume=True, score_captions=words)
    assert (resumed.started_at, resumed.checksum) == (2, whole.checksum)
    assert losses(run) == losses(other)
    assert best(run) == best(other)


def test_a_signal_after_its_last_batch_costs_no_further_step(
    recipe_file: Recipe, losses: Any, tmp_path: Path
) -> None:
    path = evaluated(recipe_file, kinds=["captions"])
    interrupted(path, by=1)
    rows = losses(tmp_path / "run")
    assert steps(rows) == [1, 2]
    assert "held_out/pairs.words" in rows[-1]
    resumed = train(load_recipe(path), resume=True, score_captions=words)
    assert (resumed.started_at, resumed.steps) == (2, 6)
    assert steps(losses(tmp_path / "run")) == [1, 2, 3, 4, 5, 6]


def test_without_an_evaluation_its_row_is_written_all_the_same(
    recipe_file: Recipe, losses: Any, tmp_path: Path
) -> None:
    path = evaluated(recipe_file)
    interrupted(path, by=1)
    train(load_recipe(path, ["evaluation=null"]), resume=True)
    assert steps(losses(tmp_path / "run")) == [1, 2, 3, 4, 5, 6]


def test_processes_leave_it_together(recipe_file: Recipe, losses: Any, tmp_path: Path) -> None:
    path = evaluated(recipe_file)
    run = tmp_path / "run"
    started, _ = start(path, processes=2, score=words_then_interrupted)
    for process in started:
        process.join(SECONDS)
    assert [process.exitcode for process in started] == [128 + signal.SIGTERM] * 2
    assert steps(losses(run)) == [1]
    result, _ = finish(*start(path, processes=2, resume=True))
    assert result.started_at == 2
    rows = losses(run)
    assert steps(rows) == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "held_out/alpaca.perplexity" in row] == [2, 4, 6]


def test_what_one_process_cannot_read_none_scores(
    recipe_file: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else they would make unequally many passes, and wait for each other for ever."""
    path = evaluated(recipe_file, kinds=["captions"], steps=2)
    asked: list[int] = []

    def score(captions: Any, references: Any) -> Mapping[str, float]:
        asked.append(len(captions))
        return words(captions, references)

    gather = SingleProcess.gather

    def with_another(self: Any, value: Any) -> list[Any]:
        return [[], [0, 4]] if value == [] else gather(self, value)

    train(load_recipe(path), score_captions=score)
    monkeypatch.setattr(SingleProcess, "gather", with_another)
    train(load_recipe(path, ["out=" + str(path.parent / "other")]), score_captions=score)
    assert asked == [9, 7]
