"""A run of a recipe: what it writes, and going on as if nothing had happened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llama_adapter import LlamaAdapterForConditionalGeneration, LlamaAdapterProcessor
from llama_adapter.training.launch import train
from llama_adapter.training.recipe import load_recipe
from llama_adapter.training.run import Outcome, Watcher

Recipe = Callable[..., Path]


def run(path: Path, *overrides: str, **options: Any) -> Outcome:
    return train(load_recipe(path, overrides), **options)


def test_a_run_leaves_an_adapter_metrics_and_checkpoints(
    recipe_file: Recipe, losses: Any, tmp_path: Path
) -> None:
    outcome = run(recipe_file())
    rows = losses(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(row["loss/caption"] > 0 and row["loss/instruction"] > 0 for row in rows)
    assert {"grad_norm/vision", "grad_norm/language", "lr/gates", "tokens"} <= rows[0].keys()
    gates = [name for name in rows[1] if name.startswith("gate/")]
    assert len(gates) == 3
    assert rows[-1]["lr/vision"] < rows[1]["lr/vision"]
    kept = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert kept == ["step-00000004", "step-00000006"]
    model = LlamaAdapterForConditionalGeneration.from_pretrained(outcome.adapter)
    LlamaAdapterProcessor.from_pretrained(outcome.adapter)
    assert outcome.trained == {
        "adapter": sum(p.numel() for _, p in model.adapter.named_parameters())
    }


def test_stopped_and_resumed_equals_uninterrupted(
    recipe_file: Recipe, losses: Any, tmp_path: Path
) -> None:
    """To the bit, wherever it stops; dropout, data and optimizer included."""
    path = recipe_file()
    whole = run(path, f"out={tmp_path}/whole")

    class Stop(Exception):
        pass

    def stop_at(step: int) -> Watcher:
        def watch(row: dict[str, Any]) -> None:
            if row["step"] == step:
                raise Stop

        return Watcher(step=watch)

    out = f"out={tmp_path}/parts"
    with pytest.raises(Stop):
        run(path, out, watcher=stop_at(1))
    for step in (3, 5):
        with pytest.raises(Stop):
            run(path, out, resume=True, watcher=stop_at(step))
    parts = run(path, out, resume=True)
    assert parts.started_at == 4
    assert parts.checksum == whole.checksum
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
