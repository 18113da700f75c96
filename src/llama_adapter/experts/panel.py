"""Several experts at once: in parallel, each with a time limit, remembered, cut to a budget.

An expert that fails or takes too long never costs the answer: its report says what happened.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

from PIL import Image

from llama_adapter.errors import ConfigError
from llama_adapter.experts.base import (
    Chooser,
    Expert,
    Finding,
    FollowUpExpert,
    Report,
    TimedExpert,
    traits_of,
)
from llama_adapter.experts.cache import ReportCache
from llama_adapter.experts.wording import CountTokens, deduplicate, fit, rough_tokens
from llama_adapter.processing.processor import LlamaAdapterProcessor

Picture = Image.Image | Sequence[Image.Image]
"""A picture, or the frames of a video."""

MAX_FRAMES = 4
"""Frames of a video that experts look at, evenly spread."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Consultation:
    """What all experts together have to say."""

    reports: tuple[Report, ...]

    @property
    def text(self) -> str:
        """The paragraphs of those that have something to say, one below the other."""
        return "\n".join(report.text for report in self.reports if report.text)


class Panel:
    """Experts that are consulted together.

    Those that look at pictures work in parallel; one that uses the answering model itself works
    in the calling thread, which no one else does meanwhile; those that start from what others
    found (`FollowUpExpert`) come last.
    """

    takes_frames = True
    """Pictures may be lists of frames."""

    def __init__(
        self,
        experts: Sequence[Expert],
        *,
        timeout: float = 30.0,
        max_tokens: int = 512,
        count: CountTokens = rough_tokens,
        cache: ReportCache | None = None,
    ) -> None:
        """Set up.

        Args:
            experts: whom to ask; their reports come back in this order.
            timeout: seconds that each of them has.
            max_tokens: most tokens that all their texts together may have in a prompt.
            count: how to count tokens; by default roughly.
            cache: where findings are remembered; None: nowhere.
        """
        if not 0 < timeout <= threading.TIMEOUT_MAX:
            raise ConfigError(
                f"timeout of experts must be above 0 seconds and at most "
                f"{threading.TIMEOUT_MAX:.0f}, got {timeout}"
            )
        if max_tokens < 1:
            raise ConfigError(f"max_tokens of experts must be at least 1, got {max_tokens}")
        self.experts = tuple(experts)
        self.timeout = timeout
        self.max_tokens = max_tokens
        self.count = count
        self.cache = cache
        self._late: dict[int, _Call] = {}

    @classmethod
    def beside(
        cls,
        processor: LlamaAdapterProcessor,
        experts: Sequence[Expert],
        *,
        timeout: float = 30.0,
        max_tokens: int = 512,
        cache: ReportCache | None = None,
    ) -> Self:
        """A panel that counts with a processor's tokenizer and leaves half of the context free."""
        room = processor.context_length
        return cls(
            experts,
            timeout=timeout,
            max_tokens=max_tokens if room is None else min(max_tokens, max(1, room // 2)),
            count=processor.count_tokens,
            cache=cache,
        )

    def consult(
        self, images: Sequence[Picture], question: str, *, known: Sequence[Report] = ()
    ) -> Consultation:
        """What the experts report, cut to the budget; `known` are earlier reports to build on."""
        found = self.findings(images, question, known=known)
        return Consultation(reports=self.fit(found, question))

    def fit(self, reports: Sequence[Report], question: str) -> tuple[Report, ...]:
        """The reports cut to this panel's budget."""
        return fit(reports, question=question, max_tokens=self.max_tokens, count=self.count)

    def findings(
        self, images: Sequence[Picture], question: str, *, known: Sequence[Report] = ()
    ) -> tuple[Report, ...]:
        """What the experts report, uncut."""
        shots = [_shots(image) for image in images]
        flat = [frame for frames in shots for frame in frames]
        decisions: list[Report] = []
        asked: list[Expert] = []
        for expert in self.experts:
            if isinstance(expert, Chooser):
                chosen, decision = expert.choose(flat, question)
                asked += chosen
                decisions.append(decision)
            else:
                asked.append(expert)
        looking = [e for e in asked if not isinstance(e, FollowUpExpert)] if flat else []
        seen = {id(e): _in_pictures(r, shots) for e, r in self._look(looking, flat, question)}
        before = [*known, *seen.values()]
        following = [e for e in asked if isinstance(e, FollowUpExpert)]
        later = [(e, _Call(e, question=question, reports=before).started()) for e in following]
        seen |= {id(expert): self._finish(call) for expert, call in later}
        return (*decisions, *(seen[id(expert)] for expert in asked if id(expert) in seen))

    def _look(
        self, experts: Sequence[Expert], images: Sequence[Image.Image], question: str
    ) -> list[tuple[Expert, Report]]:
        keys = self._keys(experts, images, question)
        raw = self._remembered(keys)
        calls: dict[int, _Call] = {}
        for expert in experts:
            if id(expert) in raw or traits_of(expert).on_model:
                continue
            busy = self._late.get(id(expert))
            if busy is not None and busy.is_alive():
                problem = "still busy with an earlier picture, for which it took too long"
                raw[id(expert)] = Report(expert=expert.name, problem=problem)
                continue
            call = _Call(expert, question=question, images=images, seconds=self.timeout)
            calls[id(expert)] = call.started()
        for expert in experts:
            if id(expert) not in raw and id(expert) not in calls:
                # other threads must not use the model meanwhile, and this one waits anyway
                call = _Call(expert, question=question, images=images, seconds=self.timeout)
                raw[id(expert)] = call.here()
        raw |= {number: self._finish(call) for number, call in calls.items()}
        for number, key in keys.items():
            report = raw[number]
            sound = report.problem is None and report.complete
            if self.cache is not None and sound and not report.cached:
                self.cache.put(key, report)
        return [(expert, raw[id(expert)]) for expert in experts]

    def _keys(
        self, experts: Sequence[Expert], images: Sequence[Image.Image], question: str
    ) -> dict[int, str]:
        if self.cache is None:
            return {}
        found = {id(expert): self.cache.key(expert, images, question) for expert in experts}
        return {number: key for number, key in found.items() if key is not None}

    def _remembered(self, keys: Mapping[int, str]) -> dict[int, Report]:
        found: dict[int, Report] = {}
        for number, key in keys.items():
            started = time.perf_counter()
            report = self.cache.get(key) if self.cache is not None else None
            if report is not None:
                found[number] = replace(report, seconds=time.perf_counter() - started)
        return found

    def _finish(self, call: _Call) -> Report:
        call.join(max(0.0, call.begun + self.timeout - time.perf_counter()))
        if call.is_alive():
            self._late[id(call.expert)] = call
            problem = f"took longer than {self.timeout:g} seconds"
            return Report(expert=call.expert.name, problem=problem, seconds=self.timeout)
        return call.report()


class _Call(threading.Thread):
    """One expert at work; a thread that never ends does not keep the program from ending."""

    def __init__(
        self,
        expert: Expert,
        *,
        question: str,
        images: Sequence[Image.Image] = (),
        reports: Sequence[Report] = (),
        seconds: float | None = None,
    ) -> None:
        super().__init__(daemon=True, name=f"expert {expert.name}")
        self.expert = expert
        self.begun = time.perf_counter()
        self._question = question
        self._images = images
        self._reports = reports
        self._seconds = seconds
        self._took = 0.0
        self._found: Report | None = None
        self._error: BaseException | None = None

    def started(self) -> _Call:
        self.start()
        return self

    def here(self) -> Report:
        """The report, made in the calling thread."""
        self.run()
        if self._error is not None and not isinstance(self._error, Exception):
            raise self._error  # the user interrupts
        return self.report()

    def run(self) -> None:
        try:
            self._found = self._ask()
        except BaseException as error:
            self._error = error
        self._took = time.perf_counter() - self.begun

    def _ask(self) -> Report:
        expert = self.expert
        if isinstance(expert, FollowUpExpert):
            return expert.consult_after(self._question, self._reports)
        if isinstance(expert, TimedExpert) and self._seconds is not None:
            return expert.consult_within(self._images, self._question, seconds=self._seconds)
        return expert.consult(self._images, self._question)

    def report(self) -> Report:
        """What was found, or what went wrong."""
        if self._found is not None:
            return replace(self._found, seconds=self._took)
        error = self._error
        words = " ".join(str(error).split())[:300]
        problem = f"{type(error).__name__}: {words}" if words else type(error).__name__
        return Report(expert=self.expert.name, problem=problem, seconds=self._took)


def _shots(picture: Picture) -> list[Image.Image]:
    """The picture, or a few frames from all over a video."""
    if isinstance(picture, Image.Image):
        return [picture]
    frames = list(picture)
    if len(frames) <= MAX_FRAMES:
        return frames
    return [frames[len(frames) * (2 * i + 1) // (2 * MAX_FRAMES)] for i in range(MAX_FRAMES)]


def _in_pictures(report: Report, shots: Sequence[Sequence[Image.Image]]) -> Report:
    """The report with findings by picture and frame instead of by image, each found once."""
    places = [
        (picture, frame if len(frames) > 1 else None)
        for picture, frames in enumerate(shots)
        for frame in range(len(frames))
    ]
    placed: list[Finding] = []
    for finding in report.findings:
        picture, frame = places[min(max(finding.picture, 0), len(places) - 1)]
        placed.append(replace(finding, picture=picture, frame=frame))
    return replace(report, findings=deduplicate(placed))
