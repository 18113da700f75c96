"""Recipes: every shipped one is valid, and nothing misspelt passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from llama_adapter.errors import ConfigError
from llama_adapter.miniature.sources import SOURCES_WITH_MINIATURES
from llama_adapter.training.recipe import Recipe, load_recipe, parse_recipe

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
SHIPPED = (
    "paper-7b",
    "photos",
    "photos-continued",
    "photos-answers",
    "photos-captions",
    "photos-coco",
    "photos-more",
    "photos-own",
    "chat-7b",
    "chat-70b-fsdp",
    "v1-alpaca",
    "caption-expert",
    "llava-finetune",
    "miniature-caption-expert",
    "miniature-v2",
    "qwen3-siglip",
    "4bit-7b",
    "toy",
    "captions-and-instructions",
)


def minimal(**changes: Any) -> dict[str, Any]:
    return {
        "out": "runs/mine",
        "steps": 10,
        "base": {"model": "some/base"},
        "vision": {"model": "some/tower"},
        "captions": {"sources": [{"type": "pairs", "path": "a.tsv"}]},
        "instructions": {"sources": [{"type": "alpaca", "path": "a.json"}]},
        **changes,
    }


def write(path: Path, values: Any) -> Path:
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return path


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_are_valid(name: str) -> None:
    path = RECIPES / f"{name}.yaml"
    recipe = load_recipe(path, types=SOURCES_WITH_MINIATURES)
    assert recipe.streams
    assert "ours" in path.read_text().lower()


def test_every_recipe_file_is_listed() -> None:
    assert sorted(path.stem for path in RECIPES.glob("*.yaml")) == sorted(SHIPPED)


def test_the_papers_setting() -> None:
    recipe = load_recipe(RECIPES / "paper-7b.yaml")
    semantics = recipe.adapter.adapter_config()
    assert (semantics.visual_layers, semantics.prompt_layers) == (1, 31)
    assert semantics.visual_prompt_length == 20
    assert semantics.prompt_layer_indices(32) == range(1, 32)
    assert recipe.optimizer.joint == "disjoint"


def test_a_resolved_recipe_reads_back_as_itself(tmp_path: Path) -> None:
    recipe = load_recipe(RECIPES / "toy.yaml", types=SOURCES_WITH_MINIATURES)
    path = write(tmp_path / "resolved.yaml", recipe.to_yaml())
    assert load_recipe(path, types=SOURCES_WITH_MINIATURES) == recipe


def test_overrides_change_single_values(tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", minimal())
    recipe = load_recipe(
        path,
        [
            "steps=20",
            "optimizer.vision_lr=1e-4",
            "instructions.sources.0.path=other.json",
            "adapter.visual_layers=2",
            "data.padding=max_length",
        ],
    )
    assert recipe.steps == 20
    assert recipe.optimizer.vision_lr == 1e-4
    assert recipe.instructions is not None
    assert recipe.instructions.sources[0].model_extra == {"path": "other.json"}
    assert recipe.adapter.adapter_config().visual_layers == 2
    assert recipe.data.padding == "max_length"


BAD: list[tuple[dict[str, Any], str]] = [
    ({"stps": 1}, r"stps: unknown key; did you mean 'steps'\?"),
    ({"optimizer": {"vison_lr": 1}}, r"optimizer.vison_lr: unknown key; did you mean 'vision_lr'"),
    (
        {"instructions": {"sources": [{"type": "alpaca", "pth": "a.json"}]}},
        r"instructions.sources.0.pth: unknown key; did you mean 'path'.*path: is missing",
    ),
    (
        {"instructions": {"sources": [{"type": "alpca", "path": "a.json"}]}},
        r"instructions.sources.0.type: unknown source type 'alpca'; did you mean 'alpaca'\?",
    ),
    ({"instructions": {"sources": [], "rows": 1}}, "instructions.sources: .*at least 1"),
    (
        {"instructions": {"sources": [{"type": "alpaca"}], "row_lenght": 9}},
        "instructions.row_lenght: unknown key; did you mean 'row_length'",
    ),
    ({"adapter": {"visual_layer": 2}}, "adapter: .*'visual_layer'; did you mean 'visual_layers'"),
    ({"adapter": {"preset": "v3"}}, "adapter: unknown preset 'v3'"),
    ({"adapter": {"preset": "v2-chat"}}, "captions are of no use"),
    ({"adapter": {"start": "runs/a", "preset": "v2"}}, "start brings its own settings"),
    ({"vision": None}, "captions need a vision encoder"),
    ({"captions": None, "instructions": None}, "needs captions, instructions, or both"),
    ({"evaluation": {"every": 5}}, "evaluation needs samples to score: set held_out"),
    (
        {
            "evaluation": {"best": "alpca.perplexity"},
            "instructions": {"sources": [{"type": "alpaca", "path": "a", "held_out": 4}] * 2},
        },
        "'alpca.perplexity', but the scores are alpaca.perplexity, alpaca-2.perplexity, ...",
    ),
    ({"seed": -1}, "seed: .*greater than or equal to 0, got -1"),
    (
        {"instructions": {"sources": [{"type": "alpaca", "path": "a", "weight": float("inf")}]}},
        "instructions.sources.0.weight: .*less than or equal to 10000",
    ),
    ({"steps": None}, "needs steps, minutes, or both: how long to train"),
    ({"minutes": 0}, "minutes: .*greater than 0"),
    (
        {
            "instructions": {"sources": [{"type": "alpaca", "path": "a"}], "start": 0.5},
            "captions": None,
        },
        r"instructions\.start would leave steps without a batch: it must be 0",
    ),
    (
        {
            "instructions": {"sources": [{"type": "alpaca", "path": "a"}], "every": 2},
            "captions": None,
        },
        r"instructions\.every would leave steps without a batch: it must be 1",
    ),
    (
        {"optimizer": {"language_anneal": {"until": 0, "factor": 0.1}}},
        "language_anneal.until: .*greater than 0",
    ),
    ({"optimizer": {"projector_optimizer": "sgd"}}, "projector_optimizer: .*'muon'"),
    ({"steps": 0}, "steps: .*greater than or equal to 1, got 0"),
    ({"data": {"padding": "pad"}}, "data.padding: .*'packed'.*got 'pad'"),
    ({"optimizer": {"vision_lr": "fast"}}, "optimizer.vision_lr: .*number.*got 'fast'"),
    # sizes that only a slip of the finger or malice can mean
    ({"steps": 10**12}, "steps: .*less than or equal to 1000000000, got 1000000000000"),
    ({"seed": 2**70}, "seed: must be smaller than 2.*63, got an integer of 71 bits"),
    ({"data": {"workers": 10**6}}, "data.workers: .*less than or equal to 512"),
    ({"lora": {"rank": 10**12}}, "lora.rank: .*less than or equal to 32768"),
    ({"lora": {"rank": 4, "alpha": float("inf")}}, "lora.alpha: .*finite"),
    ({"optimizer": {"language_lr": float("nan")}}, "optimizer.language_lr: must be a number"),
    ({"optimizer": {"language_lr": float("inf")}}, "optimizer.language_lr: .*finite"),
    ({"optimizer": {"gate_lr": -1}}, "optimizer.gate_lr: .*greater than or equal to 0"),
    ({"compute": {"threads": 10**9}}, "compute.threads: .*less than or equal to 512"),
    # values of another kind than any setting
    ({"steps": True}, "steps: must not be true or false, got True"),
    ({"out": "runs/a\0b"}, r"out: holds the character '.x00', got 'runs/a.x00b'"),
    ({"base": {"model": "a\ud800"}}, r"base.model: holds the character '.ud800'"),
    ({"base": {"model": b"base"}}, "base.model: must be text, .*got a bytes"),
    ({"data": {3: 4}}, "data: keys must be plain text, got 3"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_what_is_wrong_is_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", minimal(**changes))
    with pytest.raises(ConfigError, match=message) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps", "an override is key.path=value, got 'steps'"),
        ("optimizer.vison_lr=1", "did you mean 'vision_lr'"),
        ("captions.sources.4.path=x", "captions.sources is a list of 1"),
        ("steps.more=1", "steps is 10, which has no keys"),
        ("data.workers=[1", "the value of override 'data.workers=.1' is not valid YAML"),
        ("seed=2020-13-45", "is not valid YAML: month must be"),
        ("seed=!!bool x", "is not valid YAML"),
        ("captions.sources." + "9" * 5000 + ".path=x", "captions.sources is a list of 1"),
        (".".join("a" * 5000) + "=1", "keys are nested deeper than 32 levels"),
    ],
)
def test_bad_overrides_are_refused(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(write(tmp_path / "r.yaml", minimal()), [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("out: [a", "is not valid YAML"),
        ("- a\n- b\n", "must hold keys and values, got list"),
        ("out: a\nsteps: 1\nsteps: 2\n", "key 'steps' occurs twice"),
        ("", "must hold keys and values, got NoneType"),
        ("? [a, b]\n: 1\n", "is not valid YAML: .*unhashable key"),
        ("out: 2020-13-45\n", "is not valid YAML: month"),
        ("out: !!bool x\n", "is not valid YAML"),
        ("out: !!python/object/apply:os.system [true]\n", "is not valid YAML"),
        ("[" * 5000, "nested too deeply"),
        (
            "a0: &a0 [x, x]\n"
            + "".join(f"a{n + 1}: &a{n + 1} [*a{n}, *a{n}]\n" for n in range(40)),
            "aliases",
        ),
        ("steps: " + "9" * 5000, "is not valid YAML: Exceeds the limit"),
        ("#" * (1 << 20) + "\n", "bytes, at most"),
    ],
)
def test_files_that_are_no_recipe(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(write(tmp_path / "r.yaml", text))
    with pytest.raises(ConfigError, match=r"cannot read .*absent.yaml: No such file"):
        load_recipe(tmp_path / "absent.yaml")
    (tmp_path / "r.yaml").write_bytes(b"out: \xff\n")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        load_recipe(tmp_path / "r.yaml")


def test_old_names_of_keys_are_read() -> None:
    recipe = parse_recipe(minimal(data={"max_broken": 0.2, "overlong": "truncate"}))
    assert recipe.data.max_invalid == 0.2
    assert recipe.data.too_long == "truncate"
    with pytest.raises(ConfigError, match="max_broken is the old name of max_invalid; both"):
        parse_recipe(minimal(data={"max_broken": 0.2, "max_invalid": 0.2}))


def test_recipes_never_change() -> None:
    recipe = parse_recipe(minimal())
    assert isinstance(recipe, Recipe)
    with pytest.raises(Exception, match="frozen"):
        recipe.steps = 3  # type: ignore[misc]
