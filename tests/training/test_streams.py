"""Opening a recipe's data: held-out parts, and records that are in no row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llama_adapter.errors import DataError
from llama_adapter.miniature.bundled import DECODER, PLACEHOLDER_TEXT, VISION, toy_processor
from llama_adapter.training.build import load_processor
from llama_adapter.training.dry_run import check_recipe
from llama_adapter.training.launch import train
from llama_adapter.training.recipe import Recipe, parse_recipe
from llama_adapter.training.streams import RecipeData, open_data


def recipe_of(folder: Path, **changes: Any) -> Recipe:
    return parse_recipe(
        {
            "out": str(folder / "run"),
            "steps": 1,
            "base": {"model": DECODER, "dtype": "float32"},
            "vision": {"model": VISION},
            "adapter": {"visual_scope": "placeholders"},
            "prompt": {"template": "toy", "placeholder_text": PLACEHOLDER_TEXT},
            "data": {"workers": 0, "max_invalid": 0.1, "cache": False},
            "compute": {"device": "cpu"},
            **changes,
        }
    )


def opened(recipe: Recipe) -> RecipeData:
    return open_data(recipe, toy_processor(recipe.adapter.adapter_config()))


@pytest.fixture
def captions(tmp_path: Path) -> dict[str, Any]:
    """Ten pictures with three captions each."""
    for number in range(10):
        Image.new("RGB", (70, 64), (25 * number, 0, 0)).save(tmp_path / f"{number}.png")
    records = [
        {"image": f"{n}.png", "captions": [f"a red star {n}.", "a star.", "red."]}
        for n in range(10)
    ]
    (tmp_path / "captions.json").write_text(json.dumps(records))
    paths = {"path": str(tmp_path / "captions.json"), "images": str(tmp_path)}
    source = {"type": "coco_captions", "held_out": 5, **paths}
    return {"rows": 1, "row_length": 256, "sources": [source]}


@pytest.fixture
def instructions(tmp_path: Path) -> dict[str, Any]:
    good = {"instruction": "what is red?", "input": "", "output": "red is a color."}
    lines = [json.dumps(good)] * 29 + ['{"instruction": "what is blue?"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    source = {"type": "alpaca", "path": str(tmp_path / "a.jsonl"), "held_out": 4}
    return {"rows": 1, "row_length": 128, "sources": [source]}


def test_pictures_held_out_are_never_trained_on(tmp_path: Path, captions: dict[str, Any]) -> None:
    data = opened(recipe_of(tmp_path, captions=captions))
    held_out = data.held_out["coco_captions"]
    # five captions were asked for: all three of two pictures
    assert len(held_out) == 6
    assert held_out.groups is not None
    assert len(np.unique(held_out.groups)) == 2
    kept = {held_out[i].conversation.images[0].name for i in range(6)}
    assert len(kept) == 2
    stream = data.streams["caption"]
    seen: set[str] = set()
    for _ in range(stream.rows_in_epoch()):
        seen.update(next(stream).sample_ids)
    assert len(seen) == 24
    assert not seen & {held_out[i].id for i in range(6)}
    # nor by a run that goes on from this one with another seed
    again = opened(recipe_of(tmp_path, captions=captions, seed=1))
    assert np.array_equal(again.held_out["coco_captions"].indices, held_out.indices)
    assert next(again.streams["caption"]).sample_ids != next(data.streams["caption"]).sample_ids


def test_nothing_may_be_left_to_learn_from(tmp_path: Path, captions: dict[str, Any]) -> None:
    captions["sources"][0]["held_out"] = 29
    with pytest.raises(
        DataError,
        match=r"29 of 30 .* stay together, and there are 10 images; set held_out lower",
    ):
        opened(recipe_of(tmp_path, captions=captions))


def test_invalid_records_are_left_out_and_listed(
    tmp_path: Path, instructions: dict[str, Any]
) -> None:
    recipe = recipe_of(tmp_path, instructions=instructions)
    data = opened(recipe)
    assert [fault.where for fault in data.invalid] == [f"{tmp_path / 'a.jsonl'}:30"]
    result = train(recipe)
    assert result.invalid == 1
    (row,) = map(json.loads, (tmp_path / "run" / "broken.jsonl").read_text().splitlines())
    assert row["where"].endswith("a.jsonl:30")
    assert "lacks 'output'" in row["reason"]


def test_too_many_invalid_records_stop_before_the_first_step(
    tmp_path: Path, instructions: dict[str, Any]
) -> None:
    recipe = recipe_of(tmp_path, instructions=instructions, data={"max_invalid": 0.01})
    with pytest.raises(DataError, match=r"1 of 30 records are invalid, more than the 1.0%"):
        opened(recipe)
    instructions["sources"][0]["max_invalid"] = 0.1
    recipe = recipe_of(tmp_path, instructions=instructions, data={"max_invalid": 0.01})
    assert check_recipe(recipe, load_processor(recipe)).errors == ()
    [component] = opened(recipe).streams["instruction"].components
    assert (component.max_invalid, len(component.pieces.invalid)) == (0.1, 1)


def test_flash_attention_gets_one_long_row(tmp_path: Path, instructions: dict[str, Any]) -> None:
    """In several rows it would silently let samples attend to each other."""
    flash = {"model": DECODER, "attention": "flash_attention_2"}
    instructions["rows"] = 2
    batches = [
        next(opened(recipe_of(tmp_path, instructions=instructions, **base)).streams["instruction"])
        for base in ({}, {"base": flash})
    ]
    assert [b.inputs["position_ids"].shape for b in batches] == [(2, 128), (1, 256)]
    assert batches[0].sample_ids == batches[1].sample_ids
