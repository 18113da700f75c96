"""Checking a recipe: what it will train on and need, and everything that stands against it."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from llama_adapter import LlamaAdapterProcessor
from llama_adapter.errors import CheckpointError, ConfigError, DataError, LlamaAdapterError
from llama_adapter.miniature.bundled import DECODER, PLACEHOLDER_TEXT, VISION, toy_processor
from llama_adapter.miniature.sources import SOURCES_WITH_MINIATURES
from llama_adapter.training.build import load_processor
from llama_adapter.training.dry_run import CheckReport, check_recipe
from llama_adapter.training.launch import train
from llama_adapter.training.recipe import Recipe, load_recipe, parse_recipe

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def recipe_of(path: Path, **changes: Any) -> Recipe:
    values = {
        "out": "runs/none",
        "steps": 100,
        "base": {"model": DECODER},
        "vision": {"model": VISION},
        "adapter": {"visual_scope": "placeholders"},
        "prompt": {"template": "toy", "placeholder_text": PLACEHOLDER_TEXT},
        "instructions": {
            "rows": 2,
            "row_length": 256,
            "sources": [{"type": "alpaca", "path": str(path), "held_out": 4}],
        },
        **changes,
    }
    return parse_recipe(values, types=SOURCES_WITH_MINIATURES)


def check(recipe: Recipe, **options: Any) -> CheckReport:
    processor: LlamaAdapterProcessor = toy_processor(recipe.adapter.adapter_config())
    return check_recipe(recipe, processor, types=SOURCES_WITH_MINIATURES, **options)


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, records)))
    return path


GOOD = {"instruction": "what color is the star?", "input": "", "output": "the star is red."}


def test_a_sound_recipe() -> None:
    recipe = load_recipe(RECIPES / "toy.yaml", types=SOURCES_WITH_MINIATURES)
    report = check(recipe, samples=20)
    report.refuse()
    assert [source.samples for source in report.sources] == [8000, 8000]
    assert [source.read for source in report.sources] == [20, 20]
    assert report.sizes is not None
    assert report.sizes.layers == 6
    assert report.sizes.trained_parameters["vision"] > 0
    assert report.kinds["caption"].epochs > 1
    assert report.kinds["instruction"].answer_tokens_per_step > 100
    text = report.as_text()
    assert "⟦" in text
    assert "cut into" not in text  # every sample fits a row
    assert "nothing prevents training" in text
    assert json.loads(json.dumps(report.to_dict()))["steps"] == recipe.steps


def test_lengths_and_the_marked_example(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [GOOD] * 30)
    (source,) = check(recipe_of(path)).sources
    assert source.held_out == 4
    assert source.tokens["least"] == source.tokens["most"] == source.tokens["median"]
    assert source.histogram == ((32, 30),)
    assert source.example.startswith(f"{path}:1\n")
    assert source.example.endswith("⟦the star is red.<eos>⟧")
    assert source.answer_tokens == 30 * 6


def test_the_estimate_is_near_the_plan(tmp_path: Path) -> None:
    from llama_adapter.training.streams import open_data

    recipe = load_recipe(
        RECIPES / "toy.yaml",
        [f"out={tmp_path}", "captions.sources.0.count=600", "instructions.sources.0.count=600"],
        types=SOURCES_WITH_MINIATURES,
    )
    report = check(recipe)
    data = open_data(
        recipe, toy_processor(recipe.adapter.adapter_config()), types=SOURCES_WITH_MINIATURES
    )
    for kind, stream in data.streams.items():
        assert report.kinds[kind].rows_per_epoch == pytest.approx(stream.rows_in_epoch(), rel=0.1)


def test_invalid_records_are_listed_and_too_many_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [*[GOOD] * 60, {"instruction": "no answer"}])
    lenient = check(recipe_of(path, data={"max_invalid": 0.05}))
    lenient.refuse()
    (source,) = lenient.sources
    assert [fault.where for fault in source.invalid] == [f"{path}:61"]
    assert f"invalid: {path}:61: lacks 'output'" in lenient.as_text()
    strict = check(recipe_of(path))
    with pytest.raises(DataError, match=r"instructions.sources.0: .*1 of 61 records are invalid"):
        strict.refuse()


def test_own_slots_are_as_many_as_visual_prompts(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [GOOD] * 8)
    own = {"visual_scope": "placeholders", "placeholder_attention": "own"}
    load_processor(recipe_of(path, adapter={**own, "visual_prompt_length": 16}))
    with pytest.raises(
        ConfigError, match=r"placeholder_text is 16 tokens, .* each of the 20 visual"
    ):
        load_processor(recipe_of(path, adapter=own))


def test_every_error_is_found_at_once(tmp_path: Path) -> None:
    recipe = recipe_of(
        tmp_path / "absent.json",
        adapter={"visual_scope": "placeholders", "visual_layers": 4, "prompt_layers": 5},
        captions={"sources": [{"type": "pairs", "path": str(tmp_path / "absent.tsv")}]},
    )
    report = check(recipe)
    assert len(report.errors) == 3
    with pytest.raises(DataError) as caught:
        report.refuse()
    message = str(caught.value)
    assert "captions.sources.0: cannot read" in message
    assert "instructions.sources.0: cannot read" in message
    assert "visual_layers 4 + prompt_layers 5 exceed the base's 6 layers" in message


def test_a_device_and_a_tracker_that_are_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    path = write(tmp_path / "a.jsonl", [GOOD] * 30)
    wants = {"compute": {"device": "cuda:1"}, "logging": {"tracker": "wandb"}}
    report = check(recipe_of(path, **wants))
    assert len(report.errors) == 2
    assert "compute.device is 'cuda:1', but this machine has 1 GPU(s)" in report.errors[0]
    assert "logging.tracker 'wandb' needs the package 'wandb'" in report.errors[1]
    check(recipe_of(path, compute={"device": "cuda:0"})).refuse()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DataError, match=r"compute\.device is 'cuda:1', but no GPU can be used"):
        check(recipe_of(path, **wants)).refuse()


def test_warnings(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [GOOD] * 500)
    report = check(recipe_of(path, steps=1))
    assert any("steps go through" in warning for warning in report.warnings)
    path = write(tmp_path / "few.jsonl", [GOOD] * 30)
    source = {"type": "alpaca", "path": str(path), "held_out": 25}
    few = {"rows": 4, "row_length": 256, "sources": [source]}
    recipe = recipe_of(path, instructions=few, steps=1000)
    warnings = check_recipe(recipe, load_processor(recipe)).warnings
    assert any("times through the data" in warning for warning in warnings)
    assert any("25 of 30 samples are held out" in warning for warning in warnings)


def test_a_base_that_brings_a_chat_template_is_better_asked_with_it(
    tmp_path: Path, toy_tokenizer: Any
) -> None:
    path = write(tmp_path / "a.jsonl", [GOOD] * 30)
    tokenizer = copy.deepcopy(toy_tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    base = small_base(tmp_path / "base", tokenizer)
    for template, warned in {"alpaca": True, "chat": False}.items():
        recipe = recipe_of(
            path,
            base={"model": str(base)},
            vision=None,
            adapter={"preset": "v1"},
            prompt={"template": template},
        )
        report = check_recipe(recipe, load_processor(recipe))
        assert any("has a chat template" in warning for warning in report.warnings) == warned


def test_who_starts_from_an_adapter_is_not_told_of_a_template_that_is_not_used(
    tmp_path: Path, toy_tokenizer: Any
) -> None:
    path = write(tmp_path / "a.jsonl", [GOOD] * 30)
    tokenizer = copy.deepcopy(toy_tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    processor = LlamaAdapterProcessor(None, tokenizer, template="chat", visual_scope="all")
    started = recipe_of(path, adapter={"start": str(tmp_path / "adapter")}, prompt={})
    warnings = check_recipe(started, processor).warnings
    assert not any("has a chat template" in warning for warning in warnings)


@pytest.mark.parametrize("answers", [3, "3"])  # a number in quotes is one too
def test_answers_behind_one_image_need_an_attention_that_takes_masks(
    tmp_path: Path, answers: Any
) -> None:
    captions = write(tmp_path / "c.json", [])
    items = [{"image": f"{n}.png", "captions": ["a red dog .", "a dog runs ."]} for n in range(9)]
    captions.write_text(json.dumps(items))
    source = {"type": "caption_questions", "path": str(captions), "answers": answers}
    recipe = recipe_of(
        captions,
        out=str(tmp_path / "run"),
        base={"model": DECODER, "attention": "flex_attention"},
        instructions={"rows": 1, "row_length": 256, "sources": [source]},
    )
    refused_alike(recipe, "instructions.sources.0.answers .* 'flex_attention' does not take")


def test_a_start_that_is_not_there(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [GOOD] * 8)
    recipe = recipe_of(path, adapter={"start": str(tmp_path / "absent")}, prompt={})
    with pytest.raises(CheckpointError, match=r"start: .*absent is not an adapter directory"):
        load_processor(recipe)


def refused_alike(recipe: Recipe, message: str, **options: Any) -> None:
    """Checking and training refuse it with the same words; training leaves lengths at most."""
    report = check_recipe(recipe, load_processor(recipe), types=SOURCES_WITH_MINIATURES, **options)
    with pytest.raises(DataError, match=message):
        report.refuse()
    with pytest.raises(LlamaAdapterError, match=message):
        train(recipe, types=SOURCES_WITH_MINIATURES, **options)
    assert {path.name for path in recipe.out.glob("*")} <= {"cache"}


class Captions:
    metrics = ("cider",)

    def __call__(self, captions: Any, references: Any) -> dict[str, float]:
        return {"cider": 0.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"base": {"model": DECODER, "attention": "flash_attention_2"}},
            "cannot build the base .*[Ff]lash",
        ),
        (
            {"evaluation": {"best": "alpaca.cidr"}},
            "evaluation.best names 'alpaca.cidr', but the scores are alpaca.perplexity$",
        ),
        ({"lora": {"rank": 2, "targets": ["nothing"]}}, "lora.targets"),
        (
            {"base": {"model": DECODER, "quantization": "nf4", "random_weights": True}},
            "base.random_weights and base.quantization exclude each other",
        ),
        (
            {"instructions": {"rows": 2**17, "row_length": 2**22, "sources": [{}]}},
            "the recipe cannot fit: .* GiB, this machine has",
        ),
    ],
)
def test_checking_finds_what_training_refuses(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    if "lora" in changes:
        pytest.importorskip("peft")
    path = write(tmp_path / "a.jsonl", [GOOD] * 30)
    source = {"type": "alpaca", "path": str(path), "held_out": 4}
    if "instructions" in changes:
        changes = {"instructions": {**changes["instructions"], "sources": [source]}}
    recipe = recipe_of(path, out=str(tmp_path / "run"), **changes)
    refused_alike(recipe, message, score_captions=Captions())


def test_a_metric_of_captions_is_known_before_the_first_evaluation(tmp_path: Path) -> None:
    source = {"type": "miniature_captions", "count": 40, "held_out": 4}
    recipe = recipe_of(
        write(tmp_path / "a.jsonl", [GOOD] * 30),
        out=str(tmp_path / "run"),
        captions={"rows": 2, "row_length": 256, "sources": [source]},
        evaluation={"best": "miniature_captions.cidr"},
    )
    message = "the scores are miniature_captions.perplexity, miniature_captions.cider$"
    refused_alike(recipe, message, score_captions=Captions())


def small_base(folder: Path, tokenizer: Any, **changes: Any) -> Path:
    """An OPT of 64 learned positions, with a tokenizer beside it."""
    torch.manual_seed(0)
    values = {"vocab_size": len(tokenizer), "max_position_embeddings": 64, "hidden_size": 8}
    values |= {"word_embed_proj_dim": 8, "ffn_dim": 8, "num_hidden_layers": 2}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    OPTForCausalLM(
        OPTConfig(**{**values, **special, "num_attention_heads": 2, **changes})
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_tokens_and_positions_that_the_base_does_not_have(
    tmp_path: Path, toy_tokenizer: Any
) -> None:
    long = {**GOOD, "output": "the star is red. " * 40}
    path = write(tmp_path / "a.jsonl", [GOOD] * 29 + [long])
    common: dict[str, Any] = {
        "out": str(tmp_path / "run"),
        "vision": None,
        "adapter": {"preset": "v1"},
        "prompt": {"template": "toy"},
        "data": {"padding": "padded", "workers": 0},
    }
    base = small_base(tmp_path / "base", toy_tokenizer)
    recipe = recipe_of(path, base={"model": str(base)}, **common)
    refused_alike(recipe, "a sample of 2.. tokens, but the base has embeddings of 64 positions")
    short = recipe_of(write(tmp_path / "b.jsonl", [GOOD] * 30), base={"model": str(base)}, **common)
    check_recipe(short, load_processor(short)).refuse()
    train(short.model_copy(update={"steps": 1, "out": tmp_path / "short"}))

    rows = len(toy_tokenizer) - 8
    base = small_base(tmp_path / "narrow", toy_tokenizer, vocab_size=rows)
    recipe = recipe_of(path, base={"model": str(base)}, **common)
    refused_alike(recipe, f"id {len(toy_tokenizer) - 1}, but the base has embeddings of {rows}")


def test_the_disk_that_cached_features_take_is_told(recipe_file: Callable[..., Path]) -> None:
    path = recipe_file(vision__cache_features=True)
    recipe = load_recipe(path)
    report = check_recipe(recipe, load_processor(recipe))
    assert not report.errors
    # 24 images of 4 patches in 24 channels, in float16
    assert report.feature_cache_bytes == 24 * 4 * 24 * 2
    assert "disk for the features of at most about 24 images" in report.as_text()
