"""All claims about one adapter, measured on one exam."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from llama_adapter.miniature.exam import (
    Exam,
    Mark,
    Score,
    score,
    score_captions,
    write_captions,
)
from llama_adapter.model import LlamaAdapterForConditionalGeneration
from llama_adapter.processing.processor import LlamaAdapterProcessor

CLAIMS: dict[str, str] = {
    "C1": "questions about a text",
    "C2": "captions: things with every attribute right",
    "C2expert": "captions by the caption expert",
    "C3": "questions about a picture, zero-shot, exact",
    "C3key": "the same, right word among its category",
    "C4": "questions about a picture with the expert's caption",
    "C5": "questions about a picture, blind",
    "C5key": "blind, right word among its category",
    "C5shuffled": "questions with another scene's picture",
    "C5shuffledkey": "another scene's picture, right word among its category",
    "C6": "questions about a text beside an unrelated picture",
}
"""What each number says."""


@dataclass(kw_only=True, slots=True)
class Measured:
    """The claims' scores, and splits of some of them."""

    claims: dict[str, Score] = field(default_factory=dict)
    by_things: dict[str, dict[int, Score]] = field(default_factory=dict)
    """C2 and C3 by how many things the scene holds."""
    by_question: dict[str, dict[str, Score]] = field(default_factory=dict)
    """C1, C3, C3key by type of question."""
    captions: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, object]:
        """The claims, and under `by_things` and `by_question` their splits, JSON-ready."""
        return {
            **{name: s.to_dict() for name, s in self.claims.items()},
            "by_things": {
                name: {str(k): s.to_dict() for k, s in split.items()}
                for name, split in self.by_things.items()
            },
            "by_question": {
                name: {k: s.to_dict() for k, s in split.items()}
                for name, split in self.by_question.items()
            },
        }


def measure(
    model: LlamaAdapterForConditionalGeneration,
    processor: LlamaAdapterProcessor,
    exam: Exam,
    *,
    expert_captions: Sequence[str] | None = None,
) -> Measured:
    """C1 to C6 of one adapter; C4 and C2expert need the expert's captions of the exam's pool."""
    out = Measured()
    text = exam.take(model, processor, context=lambda item: item.passage)
    out.claims["C1"] = score(text)
    out.by_question["C1"] = _by_question(text)
    if model.adapter_config.is_multimodal:
        _measure_seeing(out, model, processor, exam)
    if expert_captions is not None:
        out.claims["C2expert"], out.by_things["C2expert"] = score_captions(
            expert_captions, exam.pool
        )
        helped = exam.take(
            model,
            processor,
            context=lambda item: expert_captions[item.scene],
            picture=(lambda item: item.scene) if model.adapter_config.is_multimodal else None,
        )
        out.claims["C4"] = score(helped)
    out.claims = {name: out.claims[name] for name in CLAIMS if name in out.claims}
    return out


def _measure_seeing(
    out: Measured,
    model: LlamaAdapterForConditionalGeneration,
    processor: LlamaAdapterProcessor,
    exam: Exam,
) -> None:
    out.captions = write_captions(model, processor, exam.pool.features_NPC)
    out.claims["C2"], out.by_things["C2"] = score_captions(out.captions, exam.pool)
    seen = exam.take(model, processor, picture=lambda item: item.scene)
    out.claims |= {"C3": score(seen), "C3key": score(seen, key=True)}
    out.by_things["C3"] = _by_things(seen, exam)
    out.by_question["C3"] = _by_question(seen)
    out.by_question["C3key"] = _by_question(seen, key=True)
    blind = exam.take(model, processor)
    out.claims |= {"C5": score(blind), "C5key": score(blind, key=True)}
    shuffled = exam.take(model, processor, picture=exam.unrelated)
    out.claims |= {"C5shuffled": score(shuffled), "C5shuffledkey": score(shuffled, key=True)}
    beside = exam.take(model, processor, context=lambda item: item.passage, picture=exam.unrelated)
    out.claims["C6"] = score(beside)


def _by_question(marks: Sequence[Mark], *, key: bool = False) -> dict[str, Score]:
    kinds = sorted({mark.item.asked.kind for mark in marks})
    return {k: score([m for m in marks if m.item.asked.kind == k], key=key) for k in kinds}


def _by_things(marks: Sequence[Mark], exam: Exam) -> dict[int, Score]:
    def things(mark: Mark) -> int:
        return len(exam.pool.scenes[mark.item.scene].things)

    return {n: score([m for m in marks if things(m) == n]) for n in sorted(set(map(things, marks)))}
