"""Losses that are not finite: skipped, reported, and the third in a row ends the run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import pytest

from llama_adapter.data import TrainBatch
from llama_adapter.errors import TrainingError
from llama_adapter.training.build import build, load_processor
from llama_adapter.training.callbacks import Callbacks
from llama_adapter.training.parallel import SingleProcess
from llama_adapter.training.recipe import load_recipe
from llama_adapter.training.run import TrainingRun
from llama_adapter.training.run_directory import RunDirectory
from llama_adapter.training.streams import open_data


class Spoilt:
    """A stream with pictures that hold no numbers in some of its batches."""

    def __init__(self, stream: Any, bad: Iterable[int]) -> None:
        self.stream, self.bad, self.count = stream, set(bad), 0
        self.kind = stream.kind

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> TrainBatch:
        batch = next(self.stream)
        self.count += 1
        if self.count not in self.bad:
            return batch
        pixels = batch.inputs["pixel_values"] * float("nan")
        return replace(batch, inputs={**batch.inputs, "pixel_values": pixels})

    def share_invalid(self, gather: Any) -> None:
        self.stream.share_invalid(gather)

    def state_dict(self) -> dict[str, Any]:
        return self.stream.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.stream.load_state_dict(state)

    def close(self) -> None:
        self.stream.close()


def run(path: Path, bad: Iterable[int]) -> list[str]:
    import torch

    recipe = load_recipe(path)
    said: list[str] = []
    with RunDirectory(recipe.out).acquire(recipe, resume=False):
        processor = load_processor(recipe)
        streams = dict(open_data(recipe, processor).streams)
        built = build(recipe, device=torch.device("cpu"))
        TrainingRun(
            recipe,
            built,
            processor=processor,
            streams={**streams, "caption": Spoilt(streams["caption"], bad)},
            engine=SingleProcess(built.model),
            callbacks=Callbacks(message=said.append),
        ).run()
    return said


def test_single_bad_steps_are_skipped_and_reported(
    recipe_file: Callable[..., Path], losses: Any, tmp_path: Path
) -> None:
    said = run(recipe_file(), bad=(2, 3, 5))
    assert said == [
        f"step {step}: caption loss not finite; the step is skipped" for step in (2, 3, 5)
    ]
    rows = losses(tmp_path / "run")
    assert [row["step"] for row in rows if "skipped" in row] == [2, 3, 5]
    assert rows[1]["loss/caption"] is None
    assert rows[1]["loss/instruction"] > 0
    assert any("captions.tsv" in name for name in rows[1]["samples"])


def test_three_in_a_row_end_the_run_with_the_samples(recipe_file: Callable[..., Path]) -> None:
    with pytest.raises(TrainingError, match=r"step 4: .* 3 times in a row; .*captions\.tsv:\d+"):
        run(recipe_file(), bad=(2, 3, 4))
