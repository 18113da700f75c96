"""Streams: an order that follows from seed and position, for any number of ranks and workers."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.data.files import open_source, stream_of, write_alpaca, write_pairs

from llama_adapter import LlamaAdapterProcessor
from llama_adapter.data import BatchStream, Component, SampleEncoder, Source, TrainBatch, measure
from llama_adapter.errors import ConfigError, DataError, TrainingError
from llama_adapter.processing.templates import TEMPLATES


@pytest.fixture
def texts(tmp_path: Path) -> Source:
    return open_source("alpaca", "instruction", path=write_alpaca(tmp_path / "a.json", 40))


@pytest.fixture
def captions(tmp_path: Path) -> Source:
    return open_source("pairs", "caption", path=write_pairs(tmp_path, 30))


def take(stream: BatchStream, count: int) -> list[TrainBatch]:
    return [next(stream) for _ in range(count)]


def same(left: TrainBatch, right: TrainBatch) -> bool:
    return left.sample_ids == right.sample_ids and all(
        torch.equal(value, right.inputs[name]) for name, value in left.inputs.items()
    )


@pytest.mark.parametrize("padding", ["packed", "padded", "max_length"])
def test_an_epoch_holds_every_sample_once(
    texts: Source, processor: LlamaAdapterProcessor, padding: str
) -> None:
    stream = stream_of(texts, processor, "instruction", rows=1, padding=padding)
    first, second = (
        [i for batch in take(stream, stream.rows_in_epoch(epoch)) for i in batch.sample_ids]
        for epoch in range(2)
    )
    assert Counter(first) == Counter(texts[i].id for i in range(len(texts)))
    assert Counter(second) == Counter(first)
    assert second != first


def test_padding_modes_differ_in_shape_alone(
    texts: Source, processor: LlamaAdapterProcessor
) -> None:
    shapes = {}
    for padding in ("packed", "padded", "max_length"):
        batch = next(stream_of(texts, processor, "instruction", rows=3, padding=padding))
        shapes[padding] = tuple(batch.inputs["input_ids"].shape)
        assert ("position_ids" in batch.inputs) == (padding == "packed")
        assert ("attention_mask" in batch.inputs) == (padding != "packed")
        if padding != "packed":
            assert len(batch.sample_ids) == 3
            assert batch.tokens == int(batch.inputs["attention_mask"].sum())
    assert shapes["packed"] == shapes["max_length"] == (3, 256)
    assert shapes["padded"][1] < 256


def test_ranks_share_the_batches_of_one(captions: Source, processor: LlamaAdapterProcessor) -> None:
    alone = stream_of(captions, processor, "caption", rows=4)
    ranks = [
        stream_of(captions, processor, "caption", rows=4, rank=rank, world=3) for rank in range(3)
    ]
    for _ in range(4):
        whole, components = next(alone), [next(stream) for stream in ranks]
        assert sum(part.answer_tokens for part in components) == whole.answer_tokens
        for row in range(4):
            part = components[row % 3].inputs["input_ids"]
            assert torch.equal(part[row // 3], whole.inputs["input_ids"][row])
        assert len({str(stream.state_dict()) for stream in (alone, *ranks)}) == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_goes_on_where_it_was(
    captions: Source, processor: LlamaAdapterProcessor, workers: int
) -> None:
    """The position is that of the last batch handed out, not of those read ahead."""
    whole = take(stream_of(captions, processor, "caption"), 12)
    first = stream_of(captions, processor, "caption", workers=workers)
    assert all(map(same, take(first, 5), whole[:5]))
    state = first.state_dict()
    first.close()
    second = stream_of(captions, processor, "caption", workers=2 - workers)
    second.load_state_dict(state)
    assert all(map(same, take(second, 7), whole[5:]))
    second.close()


def test_reading_ahead_leaves_the_global_random_state_alone(
    texts: Source, processor: LlamaAdapterProcessor
) -> None:
    before = torch.random.get_rng_state()
    stream = stream_of(texts, processor, "instruction", workers=1)
    take(stream, 2)
    stream.close()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_position_in_other_data_is_refused(
    texts: Source, processor: LlamaAdapterProcessor
) -> None:
    state = stream_of(texts, processor, "instruction").state_dict()
    other = stream_of(texts, processor, "instruction", rows=3)
    with pytest.raises(TrainingError, match="rows was 2, is now 3"):
        other.load_state_dict(state)


def test_a_position_with_others_held_out_is_refused(
    texts: Source, processor: LlamaAdapterProcessor
) -> None:
    encoder = SampleEncoder(processor, row_length=256)
    pieces = measure(texts, encoder)

    def stream(held_out: list[int], seed: int) -> BatchStream:
        component = Component(source=texts, pieces=pieces, held_out=np.array(held_out, dtype=int))
        return BatchStream("instruction", [component], encoder, rows=2, row_length=256, seed=seed)

    for seed in (0, 1):
        state = stream([1, 2], seed).state_dict()
        stream([1, 2], seed).load_state_dict(state)
        with pytest.raises(TrainingError, match="held_out was"):
            stream([1, 3], seed).load_state_dict(state)
        del state["held_out"]  # as earlier versions wrote it, which held out others for other seeds
        if seed == 0:
            stream([1, 2], seed).load_state_dict(state)
        else:
            with pytest.raises(TrainingError, match=r"earlier version .* for seed 1: going on"):
                stream([1, 2], seed).load_state_dict(state)
    none = stream([], 1).state_dict()
    del none["held_out"]
    stream([], 1).load_state_dict(none)


def test_every_process_needs_a_row(texts: Source, processor: LlamaAdapterProcessor) -> None:
    with pytest.raises(ConfigError, match=r"instructions.rows is 2, but 3 processes train"):
        stream_of(texts, processor, "instruction", rows=2, world=3)


def test_weights_and_held_out_samples(
    texts: Source, captions: Source, processor: LlamaAdapterProcessor
) -> None:
    encoder = SampleEncoder(processor, row_length=256)
    held_out = np.array([0, 1, 2])
    components = [
        Component(source=texts, pieces=measure(texts, encoder), weight=2.5, held_out=held_out),
        Component(source=captions, pieces=measure(captions, encoder), weight=0.5),
    ]
    stream = BatchStream("instruction", components, encoder, rows=1, row_length=256, seed=0)
    seen: Counter[str] = Counter()
    for batch in take(stream, stream.rows_in_epoch()):
        seen.update(batch.sample_ids)
    counts = [seen[texts[i].id] for i in range(len(texts))]
    assert counts[:3] == [0, 0, 0]
    assert set(counts[3:]) == {2, 3}
    assert sum(counts) == round(2.5 * 37)
    assert sum(seen[captions[i].id] for i in range(len(captions))) == 15
    everything = Component(source=texts, pieces=components[0].pieces, held_out=np.arange(40))
    with pytest.raises(DataError, match="leaves no sample to learn from"):
        BatchStream("instruction", [everything], encoder, rows=1, row_length=256, seed=0)


def test_lengths_are_kept_and_found_again(
    texts: Source, processor: LlamaAdapterProcessor, tmp_path: Path
) -> None:
    encoder = SampleEncoder(processor, row_length=256)
    done: list[int] = []
    first = measure(texts, encoder, cache=tmp_path / "cache", progress=done.append)
    again = measure(texts, encoder, cache=tmp_path / "cache")
    assert sum(done) == 40
    assert np.array_equal(first.table, again.table)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    measure(texts, SampleEncoder(processor, row_length=128), cache=tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert np.array_equal(measure(texts, encoder, workers=2).table, first.table)


def test_lengths_are_not_found_again_in_other_words_of_the_template(
    texts: Source,
    processor: LlamaAdapterProcessor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of an earlier version of this package, say: rows planned by them would overflow."""
    before = measure(texts, SampleEncoder(processor, row_length=256), cache=tmp_path)
    longer = replace(TEMPLATES["alpaca"], respond="### And now for the response:")
    monkeypatch.setitem(TEMPLATES, "alpaca", longer)
    changed = LlamaAdapterProcessor(processor.image_processor, processor.tokenizer)
    after = measure(texts, SampleEncoder(changed, row_length=256), cache=tmp_path)
    assert (after.column("tokens") > before.column("tokens")).all()
