"""Damaged files that a processor is loaded from: refused in one line, or loaded as they say."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.fuzzing import Campaign, mutated_bytes, mutated_json_text

from llama_adapter import CheckpointError, Conversation, LlamaAdapterProcessor
from llama_adapter.processing.processor import read_processor_options

TALK = Conversation.ask("What colour is the star?", answer="The star is red.")


@pytest.fixture(scope="module")
def sound(
    tmp_path_factory: pytest.TempPathFactory, bytes_tokenizer: Any, image_processor: Any
) -> Path:
    directory = tmp_path_factory.mktemp("sound")
    LlamaAdapterProcessor(image_processor, bytes_tokenizer, template="chat").save_pretrained(
        directory
    )
    return directory


@pytest.fixture
def directory(sound: Path, tmp_path: Path) -> Path:
    shutil.copytree(sound, tmp_path / "adapter")
    return tmp_path / "adapter"


def load(directory: Path) -> tuple[LlamaAdapterProcessor, Any]:
    processor = LlamaAdapterProcessor.from_pretrained(directory)
    return processor, processor.encode(TALK)


def test_damaged_options_are_refused_or_loaded_as_they_say(directory: Path) -> None:
    path = directory / "processor_config.json"
    stored = json.loads(path.read_text())
    campaign = Campaign("processor_config.json", inputs=60)

    def as_written(result: tuple[LlamaAdapterProcessor, Any]) -> None:
        options = {"template", "visual_scope", "placeholder_text", "channel_order"}
        written = json.loads(path.read_bytes())
        loaded = result[0].to_dict()
        assert {k: loaded[k] for k in options} == {k: written[k] for k in options}
        assert read_processor_options(directory).items() >= {k: written[k] for k in options}.items()

    for rng in campaign:
        path.write_bytes(mutated_json_text(stored, rng))
        campaign.attempt(lambda: load(directory), accepted=as_written)
    assert campaign.counts["refused"] > campaign.counts["accepted"]


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_damaged_tokenizer_is_refused_or_encodes(
    name: str, directory: Path, sound: Path, bytes_tokenizer: Any
) -> None:
    path = directory / name
    data = (sound / name).read_bytes()
    campaign = Campaign(name, inputs=40)

    def damaged(rng: random.Random) -> bytes:
        if name.endswith(".json") and rng.randrange(2):
            return mutated_json_text(json.loads(data), rng)
        return mutated_bytes(data, rng)

    def encodes(result: tuple[LlamaAdapterProcessor, Any]) -> None:
        processor, encoded = result
        assert 0 <= min(encoded.input_ids) <= max(encoded.input_ids) < len(processor.tokenizer)
        assert encoded.num_answer_tokens > 0
        prompt = processor.encode(Conversation.ask(TALK.turns[0].text)).input_ids
        assert encoded.input_ids[: len(prompt)] == prompt

    for rng in campaign:
        path.write_bytes(damaged(rng))
        campaign.attempt(lambda: load(directory), accepted=encodes)
    assert campaign.counts["refused"]


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "processor_config.json"]
)
@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe", b"[]", b"3", b"{", b'{"a": ' * 100_000, None]
)
def test_each_file_is_a_regular_file_with_an_object(
    name: str, content: bytes | None, directory: Path
) -> None:
    path = directory / name
    path.unlink()
    if content is None:
        os.mkfifo(path)
    else:
        path.write_bytes(content)
    with pytest.raises(CheckpointError) as refused:
        LlamaAdapterProcessor.from_pretrained(directory)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("field", "value", "complaint"), [
    ("image_mean", [1, 2], "image processor"), ("image_std", ["x"] * 3, "image processor"),
    ("size", {"height": 10**12, "width": 8}, "height 1000000000000"),
    ("do_resize", "no", "do_resize must be true or false, got 'no'"),
    ("image_std", [0.0, 0.0, 0.0], "image processor"),
    ("rescale_factor", float("nan"), "does not become finite values"),
    ("image_processor_type", "Evil", "is none that works on Pillow"),
])  # fmt: skip
def test_damaged_settings_of_images_are_named(
    field: str, value: Any, complaint: str, directory: Path
) -> None:
    path = directory / "processor_config.json"
    stored = json.loads(path.read_text())
    stored["image_processor"][field] = value
    path.write_text(json.dumps(stored))
    with pytest.raises(CheckpointError, match=complaint):
        LlamaAdapterProcessor.from_pretrained(directory)


@pytest.mark.parametrize(("field", "value", "complaint"), [
    ("template", 3, "template cannot be of type int"),
    ("template", "vicuna", "got 'vicuna'"),
    ("placeholder_text", "x", "placeholder_text goes with visual_scope"),
    ("channel_order", None, "channel_order cannot be of type NoneType"),
    ("temlpate", "chat", "unknown key 'temlpate'"),
])  # fmt: skip
def test_every_option_is_checked_by_name(
    field: str, value: Any, complaint: str, directory: Path
) -> None:
    path = directory / "processor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    for read in (LlamaAdapterProcessor.from_pretrained, read_processor_options):
        with pytest.raises(CheckpointError, match=complaint):
            read(directory)
