"""Killed or interrupted at any moment and resumed: the same losses and adapter, to the bit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.training.workers import SECONDS, finish, start

from llama_adapter.training import interruption
from llama_adapter.training.callbacks import Callbacks
from llama_adapter.training.launch import train
from llama_adapter.training.recipe import load_recipe
from llama_adapter.training.run_directory import RunDirectory


def test_a_killed_run_goes_on_as_if_it_had_not_been(
    recipe_file: Callable[..., Path], losses: Any, tmp_path: Path
) -> None:
    path = recipe_file(
        steps=120, checkpoint_every=3, data__workers=1, compute__threads=1, captions__start=0.2
    )
    whole = train(load_recipe(path, [f"out={tmp_path}/whole"]))
    run = tmp_path / "killed"
    seed = time.time_ns()
    rng = random.Random(seed)
    kills = 0
    for resume in (False, True):
        (process,), _ = start(path, f"out={run}", resume=resume)
        rows_before = _rows(run)
        until = time.monotonic() + SECONDS
        # some steps on, and then anywhere within a step or a checkpoint
        while process.is_alive() and _rows(run) < rows_before + 4 and time.monotonic() < until:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.15))
        kills += process.is_alive()
        process.kill()
        process.join()
    result, said = finish(*start(path, f"out={run}", resume=True))
    assert kills, "the run was over before it could be killed"
    assert any("resumed at step" in message for message in said)
    assert result.checksum == whole.checksum, f"killed at the moments of seed {seed}"
    assert losses(run) == losses(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_loses_no_step(
    recipe_file: Callable[..., Path], losses: Any, tmp_path: Path, number: signal.Signals
) -> None:
    path = recipe_file(steps=150, checkpoint_every=1000, data__workers=1, compute__threads=1)
    whole = train(load_recipe(path, [f"out={tmp_path}/whole"]))
    run = tmp_path / "interrupted"
    command = [sys.executable, "-m", "llama_adapter.cli", "train", str(path), f"out={run}"]
    with (tmp_path / "said").open("w+") as said:
        process = subprocess.Popen(
            command,
            stderr=said,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        try:
            _wait_for_rows(run, 5, process.poll)
            os.killpg(process.pid, number)
            assert process.wait(SECONDS) == 128 + number
        finally:
            process.kill()
        said.seek(0)
        text = said.read()
    steps = _rows(run)
    assert f"{number.name}: the run ends after this step and a checkpoint; again: at once" in text
    assert f"interrupted after step {steps}, which is kept: --resume goes on" in text
    assert "Traceback" not in text
    resumed = train(load_recipe(path, [f"out={run}"]), resume=True)
    assert resumed.started_at == steps < 150
    assert resumed.checksum == whole.checksum
    assert losses(run) == losses(tmp_path / "whole")


@contextmanager
def handled(number: signal.Signals, handler: Any) -> Iterator[None]:
    """A signal's handler within a block."""
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def test_a_signal_that_comes_twice_at_once_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher passes on what the terminal sent to all."""
    monkeypatch.setattr(interruption, "REPEATED_SECONDS", 600.0)
    said: list[str] = []
    for number in interruption.SIGNALS:
        # a job in the background ignores Ctrl-C
        with handled(number, signal.SIG_DFL), interruption.noticed(said.append) as found:
            for _ in range(3):
                os.kill(os.getpid(), number)
                time.sleep(0.01)
            assert found.asked == number
    assert len(said) == 2


def test_a_second_signal_acts_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interruption, "REPEATED_SECONDS", 0.0)
    said: list[str] = []
    with handled(signal.SIGINT, signal.default_int_handler):
        with interruption.noticed(said.append) as found:
            os.kill(os.getpid(), signal.SIGINT)
            assert found.asked == signal.SIGINT
            time.sleep(0.01)
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert len(said) == 1


def test_what_is_ignored_stays_ignored() -> None:
    ignored = handled(signal.SIGINT, signal.SIG_IGN)
    with ignored, interruption.noticed(pytest.fail) as found:
        os.kill(os.getpid(), signal.SIGINT)
        assert found.asked is None


@pytest.mark.parametrize("checkpoint_every", [3, 1000])
def test_an_interruption_of_the_last_step_changes_nothing(
    recipe_file: Callable[..., Path], tmp_path: Path, checkpoint_every: int
) -> None:
    path = recipe_file(steps=6, checkpoint_every=checkpoint_every, compute__threads=1)
    whole = train(load_recipe(path, [f"out={tmp_path}/whole"]))

    def interrupt(row: Any) -> None:
        if row["step"] == 5:  # noticed at the end of the sixth
            os.kill(os.getpid(), signal.SIGTERM)

    result = train(load_recipe(path), callbacks=Callbacks(step=interrupt))
    assert result.steps == 6
    assert result.checksum == whole.checksum


def test_a_run_that_is_interrupted_while_it_saves_makes_no_further_step(
    recipe_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe_file(steps=6, checkpoint_every=2, compute__threads=1)
    whole = train(load_recipe(path, [f"out={tmp_path}/whole"]))
    save = RunDirectory.save

    def interrupt(*arguments: Any, **options: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        save(*arguments, **options)

    monkeypatch.setattr(RunDirectory, "save", interrupt)
    with pytest.raises(SystemExit, match="143"):
        train(load_recipe(path))
    monkeypatch.undo()
    assert _rows(tmp_path / "run") == 2
    resumed = train(load_recipe(path), resume=True)
    assert (resumed.started_at, resumed.checksum) == (2, whole.checksum)


def test_a_terminal_that_is_gone_costs_no_step(
    recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    path = recipe_file(steps=6, checkpoint_every=1000, compute__threads=1)
    whole = train(load_recipe(path, [f"out={tmp_path}/whole"]))

    def interrupt(row: Any) -> None:
        if row["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        if row["step"] > 2:
            raise BrokenPipeError

    def tell(message: str) -> None:
        if "SIGTERM" in message or "interrupted" in message:
            raise BrokenPipeError

    with pytest.raises(SystemExit, match="143"):
        train(load_recipe(path), callbacks=Callbacks(step=interrupt, message=tell))
    resumed = train(load_recipe(path), resume=True)
    assert resumed.started_at == 3
    assert resumed.checksum == whole.checksum


def test_processes_end_together_when_one_is_interrupted(
    recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    path = recipe_file(steps=150, checkpoint_every=1000, compute__threads=1)
    run = tmp_path / "interrupted"
    started, _ = start(path, f"out={run}", processes=2)
    _wait_for_rows(run, 5, lambda: None if all(p.is_alive() for p in started) else 1)
    assert started[1].pid is not None
    os.kill(started[1].pid, signal.SIGTERM)
    for process in started:
        process.join(SECONDS)
    assert [process.exitcode for process in started] == [128 + signal.SIGTERM] * 2
    steps = _rows(run)
    resumed = train(load_recipe(path, [f"out={run}"]), resume=True)
    assert resumed.started_at == steps < 150
    assert _rows(run) == resumed.steps == 150


def _wait_for_rows(run: Path, count: int, ended: Callable[[], int | None]) -> None:
    until = time.monotonic() + SECONDS
    while _rows(run) < count and ended() is None and time.monotonic() < until:
        time.sleep(0.005)
    assert ended() is None, "the run was over before it could be interrupted"


def _rows(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0
