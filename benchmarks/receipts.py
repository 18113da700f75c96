"""How well receipts are read: character errors, reading order, seconds.

Ground truth is `ground_truth.json`: a list of {image, lines: [{quad, text}]} in reading order.
Case is ignored (transcripts are in capitals whatever the print) and so are spaces (some
transcripts have none); errors with spaces counted are given beside.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from llama_adapter.experts import Finding, Request
from llama_adapter.experts.ocr import OcrExpert

Box = tuple[float, float, float, float]
_Form = Callable[[str], str]


def measure_receipts(root: Path, *, expert: OcrExpert | None = None) -> dict[str, Any]:
    """Every folder below `root` that has boxes in its ground truth, receipt by receipt."""
    reader = expert or OcrExpert()
    result: dict[str, Any] = {}
    for path in sorted(root.glob("*/ground_truth.json")):
        records = [r for r in json.loads(path.read_text()) if "lines" in r]
        if records:
            result[path.parent.name] = _folder(path.parent, records, reader)
    return result


def _folder(folder: Path, records: Sequence[dict[str, Any]], reader: OcrExpert) -> dict[str, Any]:
    receipts: dict[str, Any] = {}
    totals = {"errors": 0, "errors_with_spaces": 0, "letters": 0, "letters_with_spaces": 0}
    seconds = processor_seconds = 0.0
    with Image.open(folder / records[0]["image"]) as first:
        # the models are loaded
        reader.consult(Request(images=[first.convert("RGB").crop((0, 0, 200, 200))]))
    for record in records:
        with Image.open(folder / record["image"]) as opened:
            image = opened.convert("RGB")
        started, spent = time.perf_counter(), time.process_time()
        findings = reader.consult(Request(images=[image])).findings
        took, used = time.perf_counter() - started, time.process_time() - spent
        seconds, processor_seconds = seconds + took, processor_seconds + used
        counted = _count(findings, record["lines"])
        receipts[record["image"]] = {
            "character_error_rate": round(counted["errors"] / counted["letters"], 4),
            "letters": counted["letters"],
            "letters_beside_the_given_lines": counted["beside"],
            "reading_order": round(counted["order"], 4),
            "seconds": round(took, 2),
            "processor_seconds": round(used, 2),
        }
        for name in totals:
            totals[name] += counted[name]
    rate = totals["errors"] / totals["letters"]
    spaced = totals["errors_with_spaces"] / totals["letters_with_spaces"]
    return {
        "receipts": receipts,
        "character_error_rate": round(rate, 4),
        "with_spaces": round(spaced, 4),
        "seconds_per_image": round(seconds / len(records), 2),
        # on a busy machine the fairer of the two
        "processor_seconds_per_image": round(processor_seconds / len(records), 2),
        "target": 0.10,
        "met": rate <= 0.10,
    }


def _count(findings: Sequence[Finding], lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Errors line by line: what was read inside a given line's box, against its text."""
    boxes = [_box(line["quad"]) for line in lines]
    read: list[list[Finding]] = [[] for _ in lines]
    beside = 0
    order: list[int] = []
    for finding in findings:
        assert finding.box is not None
        shares = [_shared(finding.box, box) for box in boxes]
        best = max(range(len(boxes)), key=shares.__getitem__)
        if shares[best] < 0.3:
            beside += len(_compact(finding.text))
            continue
        read[best].append(finding)
        order.append(best)
    counted: dict[str, Any] = {"beside": beside, "order": _in_order(order)}
    forms: dict[str, _Form] = {"": _compact, "_with_spaces": _spaced}
    for suffix, form in forms.items():
        wanted = [form(line["text"]) for line in lines]
        found = [form(" ".join(f.text for f in sorted(fs, key=_left))) for fs in read]
        counted[f"errors{suffix}"] = sum(map(edits, found, wanted))
        counted[f"letters{suffix}"] = sum(map(len, wanted))
    return counted


def _left(finding: Finding) -> float:
    assert finding.box is not None
    return finding.box[0]


def _compact(text: str) -> str:
    return "".join(text.casefold().split())


def _spaced(text: str) -> str:
    return " ".join(text.casefold().split())


def _box(quad: Sequence[float]) -> Box:
    xs, ys = quad[0::2], quad[1::2]
    return min(xs), min(ys), max(xs), max(ys)


def _shared(one: Box, other: Box) -> float:
    """Share of the first box that lies in the second."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    area = (one[2] - one[0]) * (one[3] - one[1])
    return max(0.0, width) * max(0.0, height) / area if area > 0 else 0.0


def _in_order(order: Sequence[int]) -> float:
    """Share of pairs of lines that are read in the given order (1: all of them).

    Some transcripts give the names of all items before all prices; ours is row by row.
    """
    pairs = [(a, b) for i, a in enumerate(order) for b in order[i + 1 :] if a != b]
    return sum(a < b for a, b in pairs) / len(pairs) if pairs else 1.0


def edits(one: str, other: str) -> int:
    """Levenshtein's distance.

    >>> edits("kitten", "sitting")
    3
    """
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, start=1):
        previous, row[0] = row[0], i
        for j, b in enumerate(other, start=1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (a != b))
    return row[-1]
