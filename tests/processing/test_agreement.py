"""A processor that the adapter beside it was not trained with is refused, setting by setting."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from llama_adapter import (
    CheckpointError,
    LlamaAdapterForConditionalGeneration,
    LlamaAdapterProcessor,
)
from llama_adapter.miniature.bundled import bundled_adapter

SAVED = Path(__file__).parents[1] / "saved/adapters"


@pytest.fixture
def copy(adapter_dir, tmp_path):
    return Path(shutil.copytree(adapter_dir, tmp_path / "mine"))


def edit(directory, name="processor_config.json", **changes):
    path = directory / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def images(directory, **changes):
    stored = json.loads((directory / "processor_config.json").read_text())["image_processor"]
    edit(directory, image_processor={**stored, **changes})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda d: edit(d, template="alpaca"), "template 'alpaca', .* trained with 'toy'"),
        (lambda d: edit(d, channel_order="bgr"), "channel_order 'bgr'"),
        (
            lambda d: edit(d, visual_scope="placeholders", placeholder_text="<|slot_0|>"),
            "visual_scope 'placeholders'",
        ),
        (lambda d: images(d, image_mean=[0.5, 0.5, 0.5]), "image_processor.image_mean"),
        (lambda d: images(d, image_std=[0.5, 0.5, 0.5]), "image_processor.image_std"),
        (lambda d: images(d, do_normalize=False), "image_processor.do_normalize"),
        (lambda d: images(d, size={"shortest_edge": 9}), "image_processor.size.shortest_edge"),
        (lambda d: images(d, rescale_factor=1.0), "image_processor.rescale_factor"),
    ],
)
def test_another_processor_is_refused(copy, change, named):
    LlamaAdapterProcessor.from_pretrained(copy)
    change(copy)
    with pytest.raises(CheckpointError, match=named):
        LlamaAdapterProcessor.from_pretrained(copy)


def test_another_tokenizer_is_refused(copy):
    path = copy / "tokenizer.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content, indent=7))  # laid out in another way
    LlamaAdapterProcessor.from_pretrained(copy)
    edit(copy, "tokenizer_config.json", model_max_length=77)
    LlamaAdapterProcessor.from_pretrained(copy)
    whole = (copy / "tokenizer_config.json").read_bytes()
    edit(copy, "tokenizer_config.json", bos_token=None)
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json is not the one"):
        LlamaAdapterProcessor.from_pretrained(copy)
    (copy / "tokenizer_config.json").write_bytes(whole)
    vocabulary = content["model"]["vocab"]
    one, two = list(vocabulary)[60:62]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not the one"):
        LlamaAdapterProcessor.from_pretrained(copy)


@pytest.mark.parametrize("kind", ["v2", "v1", "chat", "late", "own"])
def test_directories_of_version_0_1_have_no_record(kind, tmp_path):
    directory = Path(shutil.copytree(SAVED / kind, tmp_path / kind))
    LlamaAdapterProcessor.from_pretrained(directory)
    if kind in ("v2", "late"):
        other = {"v2": "bgr", "late": "rgb"}[kind]
        edit(directory, channel_order=other)
        with pytest.raises(CheckpointError, match=f"channel_order '{other}'"):
            LlamaAdapterProcessor.from_pretrained(directory)


def test_a_record_is_of_the_processor_that_lies_there(copy, tmp_path):
    """In whichever order model and processor are saved, and over what was there before."""
    model = LlamaAdapterForConditionalGeneration.from_pretrained(copy)
    processor = LlamaAdapterProcessor.from_pretrained(copy)
    other = LlamaAdapterProcessor(processor.image_processor, processor.tokenizer, template="alpaca")
    for save in ((model, other), (other, model), (model, processor, other), (other, processor)):
        for part in save:
            part.save_pretrained(tmp_path / "out")
        again = LlamaAdapterProcessor.from_pretrained(tmp_path / "out")
        assert again.template == [p for p in save if p is not model][-1].template
    LlamaAdapterForConditionalGeneration.from_pretrained(tmp_path / "out")


def test_the_built_in_adapters_agree():
    for name in ("v2", "caption"):
        LlamaAdapterProcessor.from_pretrained(bundled_adapter(name))
