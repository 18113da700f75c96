"""The cache of lengths: never in the way of training, never believed where it is damaged."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.data.files import open_source
from tests.fuzzing import mutated_bytes

from llama_adapter import LlamaAdapterProcessor
from llama_adapter.data import Pieces, SampleEncoder, Source, measure


@pytest.fixture
def source(tmp_path: Path) -> Source:
    records = [{"instruction": "How many?", "output": "Two. " * (1 + n % 5)} for n in range(30)]
    records[7] = {"instruction": "unanswered"}
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    return open_source("alpaca", "instruction", path=path)


@pytest.fixture
def encoder(processor: LlamaAdapterProcessor) -> SampleEncoder:
    return SampleEncoder(processor, row_length=256)


def says(cache: bytes) -> tuple[Any, bytes]:
    """A cache's head, whatever its blanks, and its table."""
    head, _, table = cache.partition(b"\n")
    return json.loads(head), table


def same(left: Pieces, right: Pieces) -> bool:
    return np.array_equal(left.table, right.table) and left.invalid == right.invalid


def test_a_disk_that_cannot_be_written_costs_a_warning(
    source: Source, encoder: SampleEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = measure(source, encoder)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.warns(UserWarning, match=r"lengths are not kept: .*No space left on device"):
            assert same(measure(source, encoder, cache=tmp_path / "cache"), expected)
    assert list((tmp_path / "cache").iterdir()) == []
    (tmp_path / "file").write_text("in the folder's place")
    with pytest.warns(UserWarning, match="lengths are not kept"):
        assert same(measure(source, encoder, cache=tmp_path / "file" / "cache"), expected)


def test_a_damaged_or_foreign_cache_is_made_anew(
    source: Source, encoder: SampleEncoder, tmp_path: Path
) -> None:
    expected = measure(source, encoder, cache=tmp_path / "cache")
    [kept] = (tmp_path / "cache").iterdir()
    content = kept.read_bytes()
    head, _, table = content.partition(b"\n")
    changed = {**json.loads(head), "num_samples": 31}
    foreign = [
        b"", b"[]\n", b"{}\n" + table, head, content + b"\0" * 20, b"[" * 100_000,
        json.dumps(changed).encode() + b"\n" + table,
        json.dumps({**changed, "pieces": 10**12}).encode() + b"\n",
    ]  # fmt: skip
    rng = random.Random(0)
    for damaged in [*foreign, *(mutated_bytes(content, rng) for _ in range(100))]:
        kept.write_bytes(damaged)
        assert same(measure(source, encoder, cache=tmp_path / "cache"), expected)
        # or it still says the same, where a blank was cut or doubled
        found = kept.read_bytes()
        assert found == content or (found == damaged and says(found) == says(content))
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").mkdir()
    os.mkfifo(kept)
    assert same(measure(source, encoder, cache=tmp_path / "cache"), expected)


def test_another_sources_cache_is_not_taken(
    source: Source, encoder: SampleEncoder, tmp_path: Path
) -> None:
    expected = measure(source, encoder, cache=tmp_path / "cache")
    [own] = (tmp_path / "cache").iterdir()
    longer = SampleEncoder(encoder.processor, row_length=64)
    measure(source, longer, cache=tmp_path / "cache")
    [other] = set((tmp_path / "cache").iterdir()) - {own}
    shutil.copy(other, own)
    assert same(measure(source, encoder, cache=tmp_path / "cache"), expected)
