"""Damaged texts, indexes and caches of experts: passages, a named omission, or a miss."""

from __future__ import annotations

import io
import json
import random
from functools import partial
from pathlib import Path

import pytest
from tests.fuzzing import Campaign, mutated_bytes, mutated_json_text

from llama_adapter.errors import DataError
from llama_adapter.experts.base import Finding, Report
from llama_adapter.experts.cache import ReportCache
from llama_adapter.experts.passages import PASSAGE_CHARACTERS, Passage, passages_of
from llama_adapter.experts.search_index import FolderIndex
from llama_adapter.experts.wording import report_text

RECORDS = [{"title": "Star", "text": "A star is red."}, {"text": "Two dogs run."}, "plain"]


def pdf() -> bytes:
    """A page with one line of text."""
    content = b"BT /F1 12 Tf 72 720 Td (A star is red.) Tj ET"
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]/Contents 4 0 R"
        b"/Resources<</Font<</F1 5 0 R>>>>>>",
        b"<</Length %d>>stream\n%s\nendstream" % (len(content), content),
        b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    ]
    file = io.BytesIO()
    file.write(b"%PDF-1.4\n")
    places = []
    for number, body in enumerate(objects, start=1):
        places.append(file.tell())
        file.write(b"%d 0 obj%s endobj\n" % (number, body))
    start = file.tell()
    rows = b"".join(b"%010d 00000 n \n" % place for place in places)
    file.write(b"xref\n0 6\n0000000000 65535 f \n" + rows)
    file.write(b"trailer<</Size 6/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF" % start)
    return file.getvalue()


def damaged(kind: str, rng: random.Random) -> bytes:
    match kind:
        case "json":
            return mutated_json_text(RECORDS, rng)
        case "jsonl":
            lines = [json.dumps(record).encode() for record in RECORDS]
            lines[rng.randrange(3)] = mutated_json_text(RECORDS[rng.randrange(3)], rng)
            return b"\n".join(lines)
        case "pdf":
            return mutated_bytes(pdf(), rng)
        case _:
            return mutated_bytes("# Stars\n\nA star is réd. ".encode() * 30, rng)


def are_sound(passages: list[Passage]) -> None:
    for passage in passages:
        assert isinstance(passage.text, str)
        assert 0 < len(passage.text) <= 2 * PASSAGE_CHARACTERS
        report = Report(expert="x", findings=(Finding(text=passage.text, kind="passage"),))
        report_text(report).encode()  # fit for a prompt


@pytest.mark.parametrize("kind", ["json", "jsonl", "md", "pdf"])
def test_damaged_texts(kind: str, tmp_path: Path) -> None:
    if kind == "pdf":
        pytest.importorskip("pypdf")
    path = tmp_path / f"a.{kind}"
    campaign = Campaign(f"expert texts {kind}", inputs=60)
    for rng in campaign:
        path.write_bytes(damaged(kind, rng))
        read = partial(passages_of, path, name=path.name)
        campaign.attempt(read, accepted=are_sound, refusals=DataError)
    assert campaign.counts["accepted"] > 5


def test_a_pdf_is_read_right(tmp_path: Path) -> None:
    pytest.importorskip("pypdf")
    (tmp_path / "a.pdf").write_bytes(pdf())
    [passage] = passages_of(tmp_path / "a.pdf", name="a.pdf")
    assert (passage.text, passage.source) == ("A star is red.", "a.pdf, page 1")


def test_damaged_indexes_are_made_anew(tmp_path: Path) -> None:
    pytest.importorskip("bm25s")
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "a.md").write_text("A star is red.")
    (folder / "b.md").write_text("Two dogs run.")
    FolderIndex(folder).search("star", count=1)
    store = FolderIndex(folder).directory
    whole = {path: path.read_bytes() for path in store.iterdir()}
    campaign = Campaign("expert indexes", inputs=30)

    def found(passages: list[Passage]) -> None:
        assert passages == [Passage(text="A star is red.", source="a.md:1")]

    for rng in campaign:
        for path, content in whole.items():
            path.write_bytes(content)
        path = rng.choice(sorted(whole))
        path.write_bytes(mutated_bytes(whole[path], rng))
        campaign.attempt(lambda: FolderIndex(folder).search("star", count=1), accepted=found)
    assert campaign.counts["accepted"] == campaign.inputs


def test_damaged_caches_forget_and_never_err(tmp_path: Path) -> None:
    path = tmp_path / "experts.sqlite"
    report = Report(expert="ocr", findings=(Finding(text="A star", kind="line", box=(0, 0, 1, 1)),))
    cache = ReportCache(path)
    for key in ("a", "b", "c"):
        cache.put(key, report)
    cache.close()
    whole = path.read_bytes()
    campaign = Campaign("expert caches", inputs=60)

    def look() -> Report | None:
        cache = ReportCache(path)
        try:
            return cache.get("b")
        finally:
            cache.close()

    def is_right(found: Report | None) -> None:
        assert found is None or found.findings == report.findings

    for rng in campaign:
        path.write_bytes(mutated_bytes(whole, rng))
        campaign.attempt(look, accepted=is_right)
    assert campaign.counts["accepted"] == campaign.inputs
