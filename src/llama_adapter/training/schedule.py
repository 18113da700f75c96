"""Which kinds of batch a step takes and its learning rates, from its index and the number of steps.

The number of steps is the recipe's, or follows from `minutes` and the pace that was measured.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from llama_adapter.data import Kind
from llama_adapter.errors import TrainingError
from llama_adapter.training.recipe import MOST_STEPS, OptimizerSection, StreamSection

Clock = Callable[[], float]
"""Seconds since some moment."""
Streams = Mapping[Kind, StreamSection]

_REVISED_EVERY = 10
"""Steps: a machine's speed changes, and one step tells little."""
_SLOW = 1.0
"""Seconds of a step from which on each one tells enough."""
_RECENT = 50
"""Steps that the pace is measured over."""


def kinds_of(step: int, steps: int, streams: Streams) -> list[Kind]:
    """The kinds of batches that a step takes, counted from 0.

    Those that have set in; once all have, each in every n-th step of its own `every`.
    """
    begun: list[Kind] = [kind for kind, s in streams.items() if step >= s.start * steps]
    if len(begun) < len(streams):
        return begun
    return [kind for kind in begun if step % streams[kind].every == 0]


def lr_scale(section: OptimizerSection, step: int, steps: int) -> float:
    """What multiplies every learning rate in a step, counted from 0."""
    warm = min(1.0, (step + 1) / max(1, section.warmup_steps))
    start = steps * (1 - section.decay_share)
    if step <= start:
        return warm
    return warm * _cosine((step - start) / max(1.0, steps - start))


def language_scale(section: OptimizerSection, step: int, steps: int) -> float:
    """An additional factor of LANGUAGE's learning rates."""
    anneal = section.language_anneal
    if anneal is None:
        return 1.0
    return anneal.factor + (1 - anneal.factor) * _cosine(step / max(1.0, anneal.until * steps))


def _cosine(progress: float) -> float:
    """From 1 to 0 while progress goes from 0 to 1, and 0 from then on."""
    return 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, progress))))


class StepBudget:
    """How many steps a run makes: fixed, or revised so that it ends in its minutes.

    Everything it does between steps counts: evaluations, checkpoints, and what came before the
    first step. Until a pace is known there are as many steps as allowed.
    """

    def __init__(
        self,
        streams: Streams,
        *,
        steps: int | None,
        minutes: float | None,
        clock: Clock = time.monotonic,
        started: float | None = None,
    ) -> None:
        """`started` is what the clock showed when the run began; None: now."""
        self.most = MOST_STEPS if steps is None else steps
        self.steps = self.most
        self.limit = None if minutes is None else minutes * 60
        self._streams = streams
        self.clock = clock
        self._started = clock() if started is None else started
        self._earlier = 0.0
        self._paces: dict[str, deque[float]] = {
            name: deque(maxlen=_RECENT) for name in ("some", "all")
        }
        self._saving = self._between = 0.0
        self._done_here = 0

    @property
    def spent(self) -> float:
        """Seconds of the run, those of the processes before this one too."""
        return self._earlier + self.clock() - self._started

    def begin(self) -> None:
        """Steps follow. TrainingError where nothing is left for them."""
        if self.limit is not None and self.spent >= self.limit:
            raise TrainingError(
                f"minutes: {self.limit / 60:g} are over before the first step: reading data and "
                f"models took {self.spent:.0f} seconds; give more"
            )

    def took(self, seconds: float, *, step: int) -> None:
        """One step took so long; `step` is its index."""
        if self.limit is None:
            return
        has_all = all(step >= s.start * self.steps for s in self._streams.values())
        self._paces["all" if has_all else "some"].append(seconds)
        self._done_here += 1
        done = step + 1
        if self.spent + self._saving >= self.limit:
            self.steps = min(self.steps, done)
        elif done >= _REVISED_EVERY and (
            done % _REVISED_EVERY == 0 or seconds >= _SLOW or done >= self.steps
        ):
            self.steps = max(done, min(self.most, done + self._more(done)))

    def took_between(self, seconds: float, *, saving: bool) -> None:
        """An evaluation, or what saving a checkpoint took."""
        if self._done_here:  # else it is of a step that an earlier process made
            self._between += seconds
        if saving:
            self._saving = seconds

    def _more(self, done: int) -> int:
        """Steps that fit into what is left."""
        assert self.limit is not None
        between = self._between / max(1, self._done_here)
        some = _mean(self._paces["some"])
        # until a step with all kinds was timed: two passes take about twice as long as one
        every = (_mean(self._paces["all"]) or 2 * some) + between
        some += between
        if every <= 0:  # a clock too coarse for what it measures
            return self.most
        left = self.limit - self.spent - self._saving
        share = max(section.start for section in self._streams.values())
        # n steps in all, the first share of them without all kinds
        total = (left + done * some) / (share * some + (1 - share) * every)
        first = max(0.0, share * total - done)
        return int(first + max(0.0, left - first * some) / every)

    def state_dict(self) -> dict[str, Any]:
        """What going on later needs."""
        return {
            "steps": self.steps,
            "spent": self.spent,
            "paces": {name: list(recent) for name, recent in self._paces.items()},
            "saving": self._saving,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; the seconds since this process began are added."""
        if self.limit is None:
            return
        self.steps = min(self.most, state["steps"])
        self._earlier = state["spent"]
        self._saving = state["saving"]
        for name, recent in self._paces.items():
            recent.clear()
            recent.extend(state["paces"].get(name, ()))


def _mean(seconds: deque[float]) -> float:
    return sum(seconds) / len(seconds) if seconds else 0.0
