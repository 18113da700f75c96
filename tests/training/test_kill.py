"""Killed at any moment and resumed: the same losses and the same adapter, to the bit."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.training.workers import SECONDS, finish, start

from llama_adapter.training.launch import train
from llama_adapter.training.recipe import load_recipe


def test_a_killed_run_goes_on_as_if_it_had_not_been(
    recipe_file: Callable[..., Path], losses: Any, tmp_path: Path
) -> None:
    path = recipe_file(
        steps=18, checkpoint_every=3, data__workers=1, compute__threads=1, captions__start=0.2
    )
    whole = train(load_recipe(path, [f"out={tmp_path}/whole"]))
    run = tmp_path / "killed"
    rng = random.Random(time.time_ns())
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
    assert result.checksum == whole.checksum
    assert losses(run) == losses(tmp_path / "whole")


def _rows(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0
