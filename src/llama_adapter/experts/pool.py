"""Several experts at once: in parallel, each with a time limit, cached, cut to a budget.

An expert that fails or takes too long never costs the answer: its report says what happened.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

from PIL import Image

from llama_adapter.conversation import Conversation, ImageRef
from llama_adapter.errors import ConfigError
from llama_adapter.experts.base import Expert, Finding, Report, Request
from llama_adapter.experts.budget import deduplicate, fit
from llama_adapter.experts.cache import ReportCache
from llama_adapter.experts.wording import report_text, rough_tokens
from llama_adapter.processing.processor import LlamaAdapterProcessor
from llama_adapter.processing.prompts import frames_of
from llama_adapter.processing.video import is_video

MAX_FRAMES = 4
"""Frames of a video that experts look at, evenly spread."""


class Router(Protocol):
    """Chooses experts for each question."""

    def choose(self, request: Request) -> tuple[Sequence[Expert], Report]:
        """Whom to ask, and a report whose notes say why."""
        ...


class Informed(NamedTuple):
    """A conversation whose context holds what experts report."""

    conversation: Conversation
    told: tuple[Report, ...]
    """Reports as the context holds them: cut to the budget; those that failed say why."""
    reports: tuple[Report, ...]
    """The same uncut, for the next question of the conversation."""


class ExpertPool:
    """Experts that are consulted together.

    Those that look at images work in parallel; one that runs the answering model works in the
    calling thread, where nothing else uses the model meanwhile; those that start from what others
    found come last.
    """

    def __init__(
        self,
        experts: Sequence[Expert] = (),
        *,
        router: Router | None = None,
        processor: LlamaAdapterProcessor | None = None,
        timeout: float = 30.0,
        max_tokens: int = 512,
        cache: ReportCache | None = None,
    ) -> None:
        """Set up.

        Args:
            experts: who is always asked; their reports come back in this order.
            router: chooses further experts for each question.
            processor: whose tokenizer counts tokens, and half of whose context stays free;
                without one tokens are counted roughly.
            timeout: seconds that each expert has.
            max_tokens: most tokens that all their texts together may have in a prompt.
            cache: where findings are kept; None: nowhere.
        """
        if not 0 < timeout <= threading.TIMEOUT_MAX:
            raise ConfigError(
                f"timeout of experts must be above 0 seconds and at most "
                f"{threading.TIMEOUT_MAX:.0f}, got {timeout}"
            )
        if max_tokens < 1:
            raise ConfigError(f"max_tokens of experts must be at least 1, got {max_tokens}")
        room = processor.context_length if processor is not None else None
        self.experts = tuple(experts)
        self.router = router
        self.timeout = timeout
        self.max_tokens = max_tokens if room is None else min(max_tokens, max(1, room // 2))
        self.count = rough_tokens if processor is None else processor.count_tokens
        self.cache = cache
        self._late: dict[int, _Call] = {}

    def inform(
        self, conversation: Conversation, *, earlier: Sequence[Report] = (), seen: int = 0
    ) -> Informed:
        """Ask about the last question, and put the reports in front of the conversation's context.

        `earlier` are reports on its first `seen` images, which are not looked at again. The
        others are decoded in what comes back, so that nobody decodes them a second time.
        """
        if not self.experts and self.router is None:
            return Informed(conversation, (), ())
        refs = [_decoded(ref) for ref in conversation.images[seen:]]
        shown = iter([*conversation.images[:seen], *refs])
        conversation = conversation.map_images(lambda _: next(shown))
        images = [ref.source for ref in refs]
        question = [turn.text for turn in conversation.turns if turn.role == "user"][-1]
        found = self.consult(images, question, earlier=earlier)
        reports = _joined(earlier, found, seen=seen)
        told = self.fit(reports, question)
        texts = [*map(report_text, told), conversation.context or ""]
        context = "\n".join(text for text in texts if text) or None
        return Informed(conversation.with_context(context), told, reports)

    def fit(self, reports: Sequence[Report], question: str) -> tuple[Report, ...]:
        """The reports cut to this pool's budget."""
        return fit(reports, question=question, max_tokens=self.max_tokens, count=self.count)

    def consult(
        self,
        images: Sequence[Image.Image | Sequence[Image.Image]],
        question: str,
        *,
        earlier: Sequence[Report] = (),
    ) -> tuple[Report, ...]:
        """What the experts report on images, or the frames of videos; uncut.

        `earlier` are reports on which those that read reports build, too.
        """
        shots = [_shots(image) for image in images]
        request = Request(images=[f for frames in shots for f in frames], question=question)
        experts = self.experts
        decisions: tuple[Report, ...] = ()
        if self.router is not None:
            chosen, decision = self.router.choose(request)
            experts, decisions = (*experts, *chosen), (decision,)
        looking = [e for e in experts if not e.info.reads_reports and request.images]
        reports = {
            key: _placed(report, shots) for key, report in self._ask(looking, request).items()
        }
        request = replace(request, reports=(*earlier, *reports.values()))
        reports |= self._ask([e for e in experts if e.info.reads_reports], request)
        return (*decisions, *(reports[id(e)] for e in experts if id(e) in reports))

    def _ask(self, experts: Sequence[Expert], request: Request) -> dict[int, Report]:
        """Reports by the identity of the expert."""
        calls = [self._call(expert, request) for expert in experts]
        open_calls = [call for call in calls if call.report is None]
        for call in open_calls:
            if not call.expert.info.uses_model:
                call.start()
        for call in open_calls:
            if call.expert.info.uses_model:
                call.run()
        reports = {id(call.expert): self._result(call) for call in calls}
        for call in open_calls:
            report = reports[id(call.expert)]
            sound = report.problem is None and report.complete
            if self.cache is not None and call.key is not None and sound:
                self.cache.put(call.key, report)
        return reports

    def _call(self, expert: Expert, request: Request) -> _Call:
        """A call that is still to be made, or one whose report is there already."""
        call = _Call(expert, request, seconds=self.timeout)
        if self.cache is not None:
            call.key = self.cache.key(expert, request)
            call.report = self.cache.get(call.key) if call.key is not None else None
        busy = self._late.get(id(expert))
        if call.report is None and busy is not None and busy.is_alive():
            problem = "still busy with an earlier question, for which it took too long"
            call.report = Report(expert=expert.name, problem=problem)
        return call

    def _result(self, call: _Call) -> Report:
        if call.ident is not None:
            call.join(max(0.0, call.begun + self.timeout - time.monotonic()))
        if call.report is not None:
            return call.report
        self._late[id(call.expert)] = call
        problem = f"took longer than {self.timeout:g} seconds"
        return Report(expert=call.expert.name, problem=problem, seconds=self.timeout)


class _Call(threading.Thread):
    """One expert at work; a thread that never ends does not keep the program from ending."""

    def __init__(self, expert: Expert, request: Request, *, seconds: float) -> None:
        super().__init__(daemon=True, name=f"expert {expert.name}")
        self.expert = expert
        self.report: Report | None = None
        self.key: str | None = None
        """Where the cache keeps the report."""
        self.begun = time.monotonic()
        self._request = request
        self._seconds = seconds

    def run(self) -> None:
        """Consult the expert: in a thread after `start`, else in the calling one."""
        self.begun = time.monotonic()
        try:
            request = replace(self._request, deadline=self.begun + self._seconds)
            report = self.expert.consult(request)
        except BaseException as error:  # whatever an expert runs into, the answer must not
            if self.ident is None and not isinstance(error, Exception):
                raise  # the user interrupts
            words = " ".join(str(error).split())[:300]
            problem = f"{type(error).__name__}: {words}" if words else type(error).__name__
            report = Report(expert=self.expert.name, problem=problem)
        self.report = replace(report, seconds=time.monotonic() - self.begun)


def _decoded(ref: ImageRef) -> ImageRef:
    """The reference with its pixels in memory."""
    frames = frames_of(ref)
    is_clip = isinstance(ref.source, tuple) or is_video(ref.source)
    return replace(ref, source=tuple(frames) if is_clip else frames[0])


def _shots(image: Image.Image | Sequence[Image.Image]) -> list[Image.Image]:
    """The image, or a few frames from all over a video."""
    frames = [image] if isinstance(image, Image.Image) else list(image)
    if len(frames) <= MAX_FRAMES:
        return frames
    return [frames[len(frames) * (2 * i + 1) // (2 * MAX_FRAMES)] for i in range(MAX_FRAMES)]


def _placed(report: Report, shots: Sequence[Sequence[Image.Image]]) -> Report:
    """The report with findings by image and frame instead of by shot, each found once."""
    places = [
        (index, frame if len(frames) > 1 else None)
        for index, frames in enumerate(shots)
        for frame in range(len(frames))
    ]
    placed: list[Finding] = []
    for finding in report.findings:
        index, frame = places[min(max(finding.image, 0), len(places) - 1)]
        placed.append(replace(finding, image=index, frame=frame))
    return replace(report, findings=deduplicate(placed))


def _joined(earlier: Sequence[Report], found: Sequence[Report], *, seen: int) -> tuple[Report, ...]:
    """Earlier reports and new ones, whose images are counted on from `seen`.

    Passages are of the latest question alone: what was found for an earlier one goes.
    """
    renewed = {report.expert for report in found if _is_of_texts(report)}
    kept = [r for r in earlier if not (r.expert in renewed and _is_of_texts(r))]
    moved = [
        replace(r, findings=tuple(replace(f, image=f.image + seen) for f in r.findings))
        for r in found
    ]
    return (*kept, *moved)


def _is_of_texts(report: Report) -> bool:
    return all(finding.kind == "passage" for finding in report.findings)
