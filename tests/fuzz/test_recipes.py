"""Recipes of any content: read as they say, or refused in one line."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import yaml
from tests.fuzzing import Campaign, mutated_bytes, mutated_json

from llama_adapter.miniature.sources import SOURCES_WITH_MINIATURES
from llama_adapter.training.recipe import Recipe, load_recipe, parse_recipe

RECIPES = sorted((Path(__file__).resolve().parents[2] / "recipes").glob("*.yaml"))
SCALARS = (
    "!!bool x", "!!int x", "!!binary x", "!!timestamp x", "!!python/name:os.system", "*a", "&a *a",
    "!!set {a}", "!!omap [a: 1]", '"\\0"', '"\\uD800"', "0x" + "f" * 5000, "9" * 5000, "1:2:3",
    ".nan", "-.inf", "2020-13-45", "<<: {a: 1}", "? [a]", "[" * 3000, "%TAG ! !", "@", "\x07",
)  # fmt: skip


def hostile(text: str, rng: random.Random) -> bytes:
    """A damaged recipe: of odd values, odd scalars, or bytes of any kind."""
    kind = rng.randrange(3)
    if kind == 0:
        return mutated_bytes(text.encode(), rng)
    if kind == 1:
        lines = text.splitlines()
        at = rng.choice([n for n, line in enumerate(lines) if ":" in line])
        lines[at] = f"{lines[at].partition(':')[0]}: {rng.choice(SCALARS)}"
        return "\n".join(lines).encode()
    return yaml.safe_dump(mutated_json(yaml.safe_load(text), rng), sort_keys=False).encode()


def says(recipe: Any, given: Any) -> bool:
    """Whether a resolved recipe has every value that its file gives."""
    if isinstance(given, dict):
        return all(says(recipe[key], value) for key, value in given.items())
    if isinstance(given, list):
        return len(recipe) == len(given) and all(map(says, recipe, given))
    if isinstance(given, bool) or given is None or isinstance(recipe, bool | None):
        return recipe is given or str(given).lower() in (str(recipe).lower(), *"01", "f", "t")
    if isinstance(recipe, int | float):
        return float(recipe) == float(given)
    return str(Path(given)) == str(Path(recipe))


def test_recipes_are_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    texts = [recipe.read_text() for recipe in RECIPES]
    for rng in (campaign := Campaign("recipes", inputs=80)):
        path.write_bytes(hostile(rng.choice(texts), rng))

        def right(recipe: Recipe) -> None:
            given = yaml.safe_load(path.read_bytes())
            resolved = recipe.model_dump(mode="json")
            assert says(resolved, given)
            stored = yaml.safe_load(recipe.to_yaml())
            assert parse_recipe(stored, types=SOURCES_WITH_MINIATURES) == recipe

        campaign.attempt(lambda: load_recipe(path, types=SOURCES_WITH_MINIATURES), accepted=right)
    assert campaign.counts["refused"] > campaign.counts["accepted"] > 0


def test_overrides_are_taken_or_refused(tmp_path: Path) -> None:
    path = RECIPES[0]
    keys = ("steps", "out", "adapter.visual_layers", "captions.sources.0.path", "a.b", "", "data",
            "captions.sources.9", "optimizer.vision_lr", "seed", "captions.sources.-1.path",
            "a" * 10_000, "steps.x", "captions.sources.²", "data.\x00", "lora")  # fmt: skip
    for rng in (campaign := Campaign("overrides", inputs=30)):
        key, value = rng.choice(keys), rng.choice((*SCALARS, "7", "[]", "{}", "null", "", "x=y"))
        campaign.attempt(
            lambda key=key, value=value: load_recipe(
                path, [f"{key}={value}"], types=SOURCES_WITH_MINIATURES
            )
        )
