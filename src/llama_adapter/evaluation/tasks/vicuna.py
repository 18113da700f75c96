"""The 80 Vicuna questions: two models' answers, scored side by side by a judge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from llama_adapter.errors import EvaluationError
from llama_adapter.evaluation.jsonfiles import (
    brief,
    field_of,
    find_file,
    items_of,
    read_objects,
    text_of,
    unique,
)
from llama_adapter.evaluation.judge_prompts import PAIRWISE
from llama_adapter.evaluation.parsing import first_line_pair, parse_score_pair
from llama_adapter.evaluation.predictions import CUT, NOT_KEPT, Predictions, number, score_of
from llama_adapter.evaluation.records import Floats, Record, Row, Tally, Verdict, ratio, table
from llama_adapter.evaluation.tasks.base import Counting, Generation, Inputs, Judging, Task

TOP = 10
"""The best score."""
ORDERS = ("as_given", "swapped")
_SCORES = ("score_1", "score_2")
_KINDS = {"coding": "coding", "math": "math"}


def read(inputs: Inputs) -> list[Record]:
    """`question.jsonl`, with the answers of the other side: `--baseline`, or ChatGPT's."""
    names = ("question.jsonl", "question*.jsonl", "**/question*.jsonl")
    path = find_file(inputs.data, names, what="the questions")
    items, _ = read_objects(path)
    baseline = _baseline(inputs, path)
    ids = [item.id("question_id") for item in items_of(items, f"{path}: item")]
    return [
        Record(
            id=id_,
            questions=(_question(item, where=f"{path}: {brief(id_)}"),),
            metadata={"category": item.get("category", "generic"), "baseline": baseline.get(id_)},
        )
        for id_, item in zip(unique(ids, where=str(path)), items, strict=True)
    ]


def _question(item: Mapping[str, Any], *, where: str) -> str:
    """The question; of several turns (MT-bench) the first, which is what is asked."""
    turns = item.get("turns")
    if "text" not in item and isinstance(turns, list) and turns:
        return text_of(turns[0], where=where)
    return text_of(field_of(item, ("text", "turns"), where=where), where=where)


def _baseline(inputs: Inputs, questions: Path) -> dict[str, str]:
    path = inputs.baseline or questions.parent / "answers" / "answer_gpt35.jsonl"
    if not path.exists():
        if inputs.baseline is not None:
            raise EvaluationError(f"{path}: no such file of answers to compare with")
        return {}
    items = items_of(read_objects(path)[0], f"{path}: line")
    return {item.id("question_id"): item.text("text") for item in items}


def read_public(path: Path) -> Predictions:
    """FastChat's review files, a judge's reply for each question, in one order or in both."""
    if path.is_dir():
        path = find_file(path, ("review*.jsonl", "*.jsonl", "*.json"), what="one file of reviews")
    objects, is_cut = read_objects(path)
    rows: dict[str, Row] = {}
    sides: dict[str, tuple[Any, Any]] = {}
    repeats = 0
    for item in items_of(objects, f"{path}: line"):
        id_, where = item.id("question_id", "id"), item.where
        verdict = _verdict(item.fields, where=where)
        pair = item.fields.get("answer1_id"), item.fields.get("answer2_id")
        if id_ not in rows:
            sides[id_] = pair
            record = Record(id=id_, questions=("",))
            rows[id_] = Row(record=record, answers=(NOT_KEPT,), verdicts={ORDERS[0]: verdict})
        elif sides[id_] != pair == sides[id_][::-1] and ORDERS[1] not in rows[id_].verdicts:
            turned = {**verdict}
            if "score_1" in verdict:
                turned = {"score_1": verdict["score_2"], "score_2": verdict["score_1"]}
            rows[id_] = replace(rows[id_], verdicts={**rows[id_].verdicts, ORDERS[1]: turned})
        elif pair == sides[id_] and verdict == rows[id_].verdicts[ORDERS[0]]:
            repeats += 1
        else:
            raise EvaluationError(
                f"{where}: question {id_[:60]} is reviewed twice, with other results"
                + (" of other answers" if not _same_sides(pair, sides[id_]) else "")
            )
    readable = sum(any("score_1" in v for v in row.verdicts.values()) for row in rows.values())
    if 2 * readable < len(rows):
        raise EvaluationError(
            f"{path}: only {readable} of {len(rows)} lines have two scores to be read; expected "
            "reviews of pairs of answers, not the answers themselves"
        )
    notes = [CUT] * is_cut
    notes += [f"{repeats} repeated reviews are counted once"] * (repeats > 0)
    return Predictions(rows=tuple(rows.values()), notes=tuple(notes))


def _same_sides(pair: tuple[Any, Any], other: tuple[Any, Any]) -> bool:
    return pair in (other, other[::-1])


def _verdict(item: Mapping[str, Any], *, where: str) -> Verdict:
    """The scores of a review, or its text where there are none to be read."""
    names = ("text", "content", "review", "output")
    stored = next((item[key] for key in ("score", "tuple", "scores") if item.get(key)), None)
    if stored is None and not any(name in item for name in names):
        field_of(item, names, where=where)
    reply = text_of(next((item[n] for n in names if item.get(n) is not None), None), where=where)
    return read_review(reply, stored) or {"reply": reply}


def read_review(reply: str, stored: object) -> Verdict | None:
    """The two scores that the file stores, else those that the text gives as its verdict.

    What is stored was corrected by hand in the published files. Something of another kind (one
    number, or the -1, -1 of a reply that a script could not read) is not a verdict.
    """
    pair = None
    if isinstance(stored, list) and len(stored) == 2:
        one, two = map(number, stored)
        if one is not None and two is not None and min(one, two) >= 0 and max(one, two) <= TOP:
            pair = one, two
    elif isinstance(stored, str):
        pair = first_line_pair(stored)
    pair = pair or parse_score_pair(reply)
    return None if pair is None else {"score_1": pair[0], "score_2": pair[1]}


def judge_questions(row: Row) -> Mapping[str, Mapping[str, str]]:
    """Both orders. Assistant 1 is the baseline, assistant 2 the model, as in published files."""
    baseline = row.record.metadata.get("baseline")
    if baseline is None:
        raise EvaluationError(
            f"question {row.record.id[:60]}: no answer to compare with; give --baseline FILE"
        )
    kind = _KINDS.get(str(row.record.metadata.get("category")), "general")
    one, two = ("answer_1", "answer_2")
    fields = {"question": row.record.question}
    given = {**fields, one: baseline, two: row.answer}
    swapped = {**fields, one: row.answer, two: baseline}
    return {f"as_given:{kind}": given, f"swapped:{kind}": swapped}


def parse(aspect: str, reply: str) -> Verdict | None:
    """The two scores, put back in the order of the models."""
    pair = parse_score_pair(reply)
    if pair is None:
        return None
    one, two = pair if aspect.startswith("as_given") else pair[::-1]
    return {"score_1": one, "score_2": two}


def count(predictions: Predictions, _: Counting) -> Tally:
    """Totals, and wins by the mean over both orders; a flip is a winner that changes with them."""
    sums, unanswered, unjudged, unparsed = [], 0, 0, 0
    for row in predictions.rows:
        pairs: dict[str, Floats] = {}
        for aspect, verdict in row.verdicts.items():
            one, two = (score_of({"score": verdict.get(n)}, low=0, high=TOP) for n in _SCORES)
            if one is not None and two is not None:
                pairs[aspect.split(":")[0]] = np.array((one, two))
        is_unread = not pairs and any("reply" in v for v in row.verdicts.values())
        unanswered += not row.is_answered
        unparsed += row.is_answered and is_unread
        unjudged += row.is_answered and not pairs and not is_unread
        line = np.zeros(9)
        if pairs:
            mean = np.mean(list(pairs.values()), axis=0)
            signs = [np.sign(pair[0] - pair[1]) for pair in pairs.values()]
            first = sum(s[0] if o == "as_given" else s[1] for o, s in pairs.items())
            line[:6] = *mean, mean[0] > mean[1], mean[0] == mean[1], mean[0] < mean[1], 1
            line[6:] = len(pairs) > 1, len(set(signs)) > 1, first - len(pairs) * mean.sum() / 2
        sums.append(line)
    totals = np.sum(sums, axis=0)
    judged = int(totals[5])
    notes = []
    if 0 < judged < len(sums):
        notes.append(f"the totals rest on {judged} of {len(sums)} reviews")
    if judged and not totals[6]:
        notes.append("judged in one order only: position bias is not removed")
    return Tally(
        n=len(predictions.rows),
        sums_UC=table(sums, columns=9),
        metrics=_metrics,
        unanswered=unanswered,
        unparsed=unparsed,
        unjudged=unjudged,
        judged=judged,
        notes=tuple(notes),
        protocol={
            "reviews": judged,
            "side 1": "baseline (answer1 of a review file)",
            "side 2": "the model",
        },
    )


def _metrics(totals: Floats) -> dict[str, Floats]:
    one, two, win_1, tie, win_2, n, both, flips, lead = np.moveaxis(totals, -1, 0)
    return {
        "total_1": one,
        "total_2": two,
        "win_1": win_1,
        "tie": tie,
        "win_2": win_2,
        "relative": 100 * ratio(two, one),
        "mean_1": ratio(one, n),
        "mean_2": ratio(two, n),
        "flips": 100 * ratio(flips, both),
        "first_place_bonus": ratio(lead, both),
    }


VICUNA_80 = Task(
    name="vicuna-80",
    summary="80 open questions, compared with another model's answers",
    read=read,
    prompts=lambda record: record.questions,
    count=count,
    read_public=read_public,
    inputs=("baseline",),
    judging=Judging(
        questions=judge_questions,
        prompts={f"{order}:{kind}": PAIRWISE[kind] for order in ORDERS for kind in PAIRWISE},
        parse=parse,
    ),
    generation=Generation(max_new_tokens=1024),
)
