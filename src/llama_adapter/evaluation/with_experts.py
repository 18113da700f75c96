"""Any answerer with experts in front of it: the same benchmark with and without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from llama_adapter.conversation import Conversation
from llama_adapter.errors import LlamaAdapterError
from llama_adapter.evaluation.answering import Answerer, Prediction
from llama_adapter.evaluation.tasks.base import Generation
from llama_adapter.experts import ExpertPool, Report, report_to_dict


class ExpertAnswerer:
    """Puts what experts say of the images before each question."""

    def __init__(self, answerer: Answerer, pool: ExpertPool, *, named: Sequence[str]) -> None:
        """Set up; `named` are the experts as the user wrote them, for the manifest."""
        self._answerer = answerer
        self._pool = pool
        self._named = tuple(named)

    def answer(
        self, conversations: Sequence[Conversation], generation: Generation, *, seed: int
    ) -> list[Prediction]:
        """One result for each conversation, with what the experts reported."""
        helped: list[Conversation] = []
        reports: list[tuple[Report, ...]] = []
        for conversation in conversations:
            try:
                told, said, _ = self._pool.inform(conversation)
            except LlamaAdapterError:
                # an image that cannot be read: the answerer says so for this record alone
                told, said = conversation, ()
            helped.append(told)
            reports.append(said)
        answers = self._answerer.answer(helped, generation, seed=seed)
        return [
            replace(answer, contexts=tuple(report_to_dict(report) for report in said))
            for answer, said in zip(answers, reports, strict=True)
        ]

    def describe(self) -> dict[str, Any]:
        """The answerer's, with the experts, their versions and limits."""
        versions = {expert.name: expert.info.version for expert in self._pool.experts}
        if self._pool.router is not None:
            versions["auto"] = None  # it may choose others for each question
        return {
            **self._answerer.describe(),
            "experts": {
                "named": list(self._named),
                "versions": versions,
                "timeout": self._pool.timeout,
                "max_tokens": self._pool.max_tokens,
            },
        }
