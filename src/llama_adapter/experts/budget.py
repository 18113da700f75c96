"""Reports cut to a number of tokens: what several frames show once, the most useful rows first."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from difflib import SequenceMatcher

from llama_adapter.experts.base import Finding, Report
from llama_adapter.experts.wording import (
    CELLS,
    harmless,
    report_text,
    rough_tokens,
    rows_of,
    words_of,
)

CountTokens = Callable[[str], int]

_AMOUNT = re.compile(
    r"\b(?:how (?:much|many)|price|cost|total|sum|amount|number|date|when|time|year|phone)\b",
    re.IGNORECASE,
)


def deduplicate(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """Each finding once over the frames of an image: the surest one, where it stood first.

    A line of text counts as the same although a letter is read differently.
    """
    kept: list[Finding] = []
    for finding in findings:
        twin = next((i for i, other in enumerate(kept) if _same(finding, other)), None)
        if twin is None:
            kept.append(finding)
        elif (finding.confidence or 0.0) > (kept[twin].confidence or 0.0):
            # in the first one's place, so that reading order and rows stay whole
            first = kept[twin]
            kept[twin] = replace(finding, frame=first.frame, row=first.row, box=first.box)
    return tuple(kept)


def _same(one: Finding, other: Finding) -> bool:
    if one.frame == other.frame or (one.image, one.kind) != (other.image, other.kind):
        return False
    a, b = one.text.casefold().strip(), other.text.casefold().strip()
    if a == b:
        return True
    # numbers that differ are different; words may be misread in one of the frames
    if one.kind != "line" or [c for c in a if c.isdigit()] != [c for c in b if c.isdigit()]:
        return False
    matcher = SequenceMatcher(None, a, b, autojunk=False)
    return matcher.real_quick_ratio() > 0.85 and matcher.ratio() > 0.85


def usefulness(rows: Sequence[Sequence[Finding]], question: str) -> list[float]:
    """How much each row may help with the question.

    Words shared with the question count 2, those of a row next to it 1, and figures 0.5 where an
    amount is asked for. Of 31 questions about five receipts, cut to 50 tokens, the text then holds
    the answer to 22; without figures to 18, with the first rows instead to 4.
    """
    asked = set(words_of(question))
    wants_figures = bool(_AMOUNT.search(question))
    shared = [len(asked & {w for found in row for w in words_of(found.text)}) for row in rows]
    scores = []
    for i, row in enumerate(rows):
        near = max(shared[max(0, i - 1) : i + 2])
        figures = wants_figures and any(c.isdigit() for found in row for c in found.text)
        scores.append(2.0 * shared[i] + (near if near > shared[i] else 0.0) + 0.5 * figures)
    return scores


def fit(
    reports: Sequence[Report],
    *,
    question: str,
    max_tokens: int,
    count: CountTokens = rough_tokens,
) -> tuple[Report, ...]:
    """The reports cut to a number of tokens altogether.

    Each may have an equal share, and what short ones leave over goes to the longer ones. Of a
    report that is too long the most useful rows are kept, in their order, and a note says how
    many; see `usefulness`.
    """
    texts = map(report_text, reports)
    costs = {index: count(text) for index, text in enumerate(texts) if text}
    fitted = list(reports)
    left = max_tokens
    for position, (index, cost) in enumerate(sorted(costs.items(), key=lambda item: item[1])):
        share = min(cost, left // (len(costs) - position))
        left -= share
        if cost > share:
            fitted[index] = _cut(reports[index], question, max_tokens=share, count=count)
    return tuple(fitted)


def _cut(report: Report, question: str, *, max_tokens: int, count: CountTokens) -> Report:
    rows = rows_of(report.findings)
    scores = usefulness(rows, question)
    # of equally useful rows the earlier one is kept
    best_first = sorted(range(len(rows)), key=lambda i: (-scores[i], i))
    costs = [count(CELLS.join(found.text for found in row)) + 1 for row in rows]
    left = max_tokens - count(report.wording.replace("{}", ""))
    chosen: list[int] = []
    for i in best_first:
        if costs[i] <= left:
            chosen.append(i)
            left -= costs[i]
    while chosen:
        kept = tuple(found for i in sorted(chosen) for found in rows[i])
        shorter = replace(report, findings=kept)
        # rows together may cost more than each alone; the least useful one goes first
        if count(report_text(shorter)) <= max_tokens:
            note = f"{len(chosen)} of {len(rows)} rows kept to stay within {max_tokens} tokens"
            return replace(shorter, notes=(*report.notes, note))
        chosen.pop()
    # better the beginning of the most useful row than nothing
    first = rows[best_first[0]][0]
    words = harmless(first.text).split()
    note = f"only the beginning of 1 of {len(rows)} rows fits {max_tokens} tokens"
    shorter = replace(report, findings=(), notes=(*report.notes, note))
    while words := words[: len(words) * 3 // 4]:
        beginning = replace(first, text=" ".join(words) + " …")
        if count(report_text(replace(shorter, findings=(beginning,)))) <= max_tokens:
            return replace(shorter, findings=(beginning,))
    return shorter
