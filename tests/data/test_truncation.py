"""Multi-turn conversations: every answer is scored, and cuts fall between exchanges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tests.data.files import open_source, write_pictures

from llama_adapter import LlamaAdapterProcessor
from llama_adapter.config import IGNORE_INDEX
from llama_adapter.conversation import Conversation, ImageRef, Message
from llama_adapter.data import Sample, SampleEncoder
from llama_adapter.errors import DataError
from llama_adapter.processing.video import Video


def talk(exchanges: int, *, words: int = 6, images: tuple[ImageRef, ...] = ()) -> Sample:
    turns = [Message("system", "Be brief.")]
    for number in range(exchanges):
        shown = images if number == 0 else ()
        turns.append(Message("user", f"question {number}?", images=shown))
        turns.append(Message("assistant", f"answer {number} " + "so " * words + "it ends"))
    return Sample(id="talk", kind="instruction", conversation=Conversation(tuple(turns)))


def answers(processor: LlamaAdapterProcessor, labels: tuple[int, ...]) -> str:
    return processor.tokenizer.decode([label for label in labels if label != IGNORE_INDEX])


@pytest.fixture(params=["alpaca", "chat", "human-assistant"])
def any_processor(request: Any, bytes_tokenizer: Any, image_processor: Any) -> Any:
    return LlamaAdapterProcessor(image_processor, bytes_tokenizer, template=request.param)


def test_every_answer_is_scored_and_nothing_else(any_processor: LlamaAdapterProcessor) -> None:
    encoder = SampleEncoder(any_processor, row_length=2048)
    sample = talk(3)
    (cut,) = encoder.cut(sample)
    assert (cut.first, cut.stop) == (0, 3)
    encoded = encoder.encode(sample, 0, 3)
    assert cut.tokens == len(encoded)
    scored = answers(any_processor, encoded.labels)
    assert [scored.count(f"answer {number}") for number in range(3)] == [1, 1, 1]
    assert "question" not in scored
    assert "brief" not in scored


def test_long_conversations_are_cut_between_exchanges(
    any_processor: LlamaAdapterProcessor,
) -> None:
    encoder = SampleEncoder(any_processor, row_length=300)
    sample = talk(12)
    cuts = encoder.cut(sample)
    assert len(cuts) > 1
    assert [cut.first for cut in cuts] == [0, *[cut.stop for cut in cuts[:-1]]]
    assert cuts[-1].stop == 12
    for cut in cuts:
        encoded = encoder.encode(sample, cut.first, cut.stop)
        assert len(encoded) == cut.tokens <= 300
        assert encoded.num_answer_tokens == cut.answer_tokens
        scored = answers(any_processor, encoded.labels)
        numbers = [n for n in range(12) if f"answer {n} " in scored]
        assert numbers == list(range(cut.first, cut.stop))
        text = any_processor.tokenizer.decode(encoded.input_ids)
        assert "Be brief." in text


def test_pieces_are_as_long_as_fits(processor: LlamaAdapterProcessor) -> None:
    encoder = SampleEncoder(processor, row_length=300)
    sample = talk(12)
    for cut in encoder.cut(sample)[:-1]:
        longer = SampleEncoder(processor, row_length=2048).encode(sample, cut.first, cut.stop + 1)
        assert len(longer) > 300


def test_every_piece_shows_the_picture(
    toy_tokenizer: Any, image_processor: Any, tmp_path: Path
) -> None:
    processor = LlamaAdapterProcessor(
        image_processor,
        toy_tokenizer,
        template="toy",
        visual_scope="placeholders",
        placeholder_text="<|slot_0|>",
    )
    image = ImageRef(source=tmp_path / write_pictures(tmp_path, 1)[0])
    sample = talk(12, images=(image,))
    encoder = SampleEncoder(processor, row_length=200)
    cuts = encoder.cut(sample)
    assert len(cuts) > 1
    for cut in cuts:
        prepared = encoder.encode_sample(sample, cut.first, cut.stop)
        assert prepared.pixels is not None
        assert len(prepared.pixels) == 1
        assert [slot for slot in prepared.encoded.placeholders if slot >= 0] == [0]


def test_an_answer_beyond_the_row_is_cut_off_where_asked(processor: LlamaAdapterProcessor) -> None:
    sample = talk(2, words=400)
    encoder = SampleEncoder(processor, row_length=512, too_long="truncate")
    cuts = encoder.cut(sample)
    assert [(cut.first, cut.stop, cut.tokens) for cut in cuts] == [(0, 1, 512), (1, 2, 512)]
    assert len(encoder.encode(sample, 1, 2)) == 512


def test_the_context_bounds_a_sample_not_the_row(
    spaces_tokenizer: Any, image_processor: Any
) -> None:
    processor = LlamaAdapterProcessor(image_processor, spaces_tokenizer, template="alpaca")
    assert processor.context_length == 512
    encoder = SampleEncoder(processor, row_length=4096)
    assert all(cut.tokens <= 512 for cut in encoder.cut(talk(60)))


def test_real_llava_conversations(
    real: Path, processor: LlamaAdapterProcessor, tmp_path: Path
) -> None:
    """The records name COCO pictures that are not here; stand-ins of the same names are."""
    records = json.loads((real / "instructions" / "llava_complex_reasoning_2k.json").read_text())
    kept = records[:20]
    (stand_in,) = write_pictures(tmp_path, 1)
    for record in kept:
        (tmp_path / Path(record["image"]).name).write_bytes((tmp_path / stand_in).read_bytes())
    path = tmp_path / "llava.json"
    path.write_text(json.dumps(kept))
    source = open_source("llava", "instruction", path=path, images=tmp_path)
    encoder = SampleEncoder(processor, row_length=4096)
    for index, record in enumerate(kept):
        prepared = encoder.encode_sample(source[index], 0, 1)
        assert prepared.pixels is not None
        scored = answers(processor, prepared.encoded.labels)
        assert record["QA"][0]["a"][:40] in scored


def test_a_damaged_video_is_an_invalid_record(
    processor: LlamaAdapterProcessor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = tuple(Image.new("RGB", (16, 16)) for _ in range(4))
    found = Video(frames=frames, times=(0.0,) * 4, seconds=1.0, name="a.mp4", repeated=1)
    monkeypatch.setattr("llama_adapter.data.truncation.load_video", lambda *_, **__: found)
    sample = talk(1, images=(ImageRef.of(tmp_path / "a.mp4"),))
    with pytest.raises(DataError, match=r"a\.mp4: 1 of 4 frames cannot be decoded"):
        SampleEncoder(processor, row_length=300).encode_sample(sample, 0, 1)
