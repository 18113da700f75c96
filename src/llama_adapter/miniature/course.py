"""A whole training on the miniature world, from fresh adapter to trained one, in minutes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel

from llama_adapter.config import AdapterConfig
from llama_adapter.errors import ConfigError
from llama_adapter.miniature.bundled import toy_processor
from llama_adapter.miniature.fairness import FairlyScored
from llama_adapter.miniature.lessons import LessonPlan, Lessons, by_length
from llama_adapter.miniature.pictures import PicturePool, Progress, make_pool
from llama_adapter.miniature.scenes import Split
from llama_adapter.model import LlamaAdapterConfig, LlamaAdapterForConditionalGeneration
from llama_adapter.processing.processor import LlamaAdapterProcessor
from llama_adapter.training.engine import OneProcess
from llama_adapter.training.joint import JointTrainer
from llama_adapter.training.machine import fast_dtype
from llama_adapter.training.recipe import LanguageAnneal, OptimizerSection


@dataclass(frozen=True, kw_only=True, slots=True)
class Course:
    """What is trained, on what, for how long."""

    adapter: AdapterConfig
    steps: int
    plan: LessonPlan = field(default_factory=LessonPlan)
    joint: Literal["disjoint", "naive"] = "disjoint"
    captions: bool = True
    instructions: bool = True
    language_first: float = 0.15
    """First share of the steps with instructions alone: captions then have something to talk to."""
    language_rest: float = 0.1
    """What LANGUAGE's learning rates have fallen to by then. A picture is read by a moving
    LANGUAGE otherwise: captions took four times as many steps to learn."""
    instruction_every: int = 4
    """After the first share, in every how many steps instructions come with the captions."""
    vision_lr: float = 1.5e-3
    matrix_lr: float | None = 0.01
    language_lr: float = 5e-3
    gate_lr: float = 2e-2

    def __post_init__(self) -> None:
        if not (self.captions or self.instructions):
            raise ConfigError("a course needs captions, instructions, or both")

    def pictures(
        self,
        tower: nn.Module,
        *,
        count: int,
        seed: int,
        split: Split = Split.TRAIN,
        progress: Progress | None = None,
    ) -> PicturePool:
        """Pictures for the course, or of test scenes for its exam."""
        return make_pool(
            tower,
            toy_processor(self.adapter),
            self.adapter,
            count=count,
            seed=seed,
            split=split,
            strange_share=self.plan.strange_share if split is Split.TRAIN else 0.0,
            progress=progress,
        )

    def optimizer(self) -> OptimizerSection:
        both = self.captions and self.instructions
        return OptimizerSection(
            joint=self.joint,
            vision_lr=self.vision_lr,
            projector_optimizer="adamw" if self.matrix_lr is None else "muon",
            projector_lr=self.matrix_lr,
            language_anneal=LanguageAnneal(until=self.language_first, factor=self.language_rest)
            if both
            else None,
            language_lr=self.language_lr,
            gate_lr=self.gate_lr,
            decay_share=0.5,
        )


@dataclass(kw_only=True, slots=True)
class History:
    """What a training measured, step by step."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0


Watcher = Callable[[int, int, dict[str, Any]], None]
"""Called after each step with the step's number, the steps in all, and what was measured."""


class Class:
    """A running course: `step` until `is_over`."""

    def __init__(
        self,
        course: Course,
        *,
        decoder: PreTrainedModel,
        tower: nn.Module,
        pool: PicturePool,
        seed: int,
        seconds: float | None = None,
    ) -> None:
        self.course = course
        dtype = fast_dtype(decoder.device)
        if dtype is not None and decoder.device.type == "cpu":
            # the CPU's fused attention is several times slower in half types, backwards
            decoder.set_attn_implementation("eager")
        self.model = LlamaAdapterForConditionalGeneration.from_base(
            decoder, tower, LlamaAdapterConfig(adapter=course.adapter), seed=seed
        )
        self.processor: LlamaAdapterProcessor = toy_processor(course.adapter)
        self.lessons = Lessons(self.processor, pool, plan=course.plan, seed=seed)
        engine = OneProcess(self.model)
        engine.module = FairlyScored(self.model)
        self.trainer = JointTrainer(
            self.model,
            course.optimizer(),
            steps=course.steps,
            autocast_dtype=dtype,
            engine=engine,
        )
        self.history = History()
        self._limit = seconds
        self._pace: dict[str, list[float]] = {}
        self._started = time.perf_counter()

    @property
    def steps(self) -> int:
        """Steps in all; settled by the time limit, where there is one."""
        return self.trainer.steps

    @property
    def is_over(self) -> bool:
        return self.trainer.step_count >= self.steps

    def step(self) -> dict[str, Any]:
        """One optimizer step; what it measured."""
        began = time.perf_counter()
        step = self.trainer.step_count
        ahead = self.course.instructions and step < self.course.language_first * self.steps
        captions = self.course.captions and not ahead
        both = not captions or step % self.course.instruction_every == 0
        instructions = self.course.instructions and both
        report = self.trainer.step(
            caption=by_length(self.lessons.captions(step)) if captions else None,
            instruction=by_length(self.lessons.instructions(step)) if instructions else None,
        )
        row: dict[str, Any] = {"step": step + 1, **report.losses}
        self.history.rows.append(row)
        self.history.steps = step + 1
        now = time.perf_counter()
        self.history.seconds = now - self._started
        self._fit_into_time(now - began, with_captions=captions)
        return row

    def _fit_into_time(self, seconds: float, *, with_captions: bool) -> None:
        """Choose the number of steps so that the course ends in time.

        Revised every few steps, since a machine's speed changes; late revisions change little.
        """
        kind = "joint" if with_captions else "ahead"
        self._pace.setdefault(kind, []).append(seconds)
        done = self.history.steps
        if self._limit is None or done < 10 or done % 10:
            return
        ahead = _recent_mean(self._pace.get("ahead"))
        # until a joint step was timed: two passes take about twice as long as one
        joint = _recent_mean(self._pace.get("joint")) or 2 * ahead
        left = self._limit - self.history.seconds
        share = self.course.language_first if self.course.instructions else 0.0
        ahead_left = 0.0
        if not with_captions and self.course.captions:
            # n steps in all, the first share of them alone: share·n·ahead + (1-share)·n·joint
            total = (left + done * ahead) / (share * ahead + (1 - share) * joint)
            ahead_left = max(0.0, share * total - done)
        pace = joint if self.course.captions else ahead
        more = ahead_left + max(0.0, left - ahead_left * ahead) / pace
        steps = max(done + 1, min(self.course.steps, done + int(more)))
        self.trainer.steps = steps


def _recent_mean(seconds: list[float] | None) -> float:
    recent = (seconds or [])[-50:]
    return sum(recent) / len(recent) if recent else 0.0


def run_course(
    course: Course,
    *,
    decoder: PreTrainedModel,
    tower: nn.Module,
    pool: PicturePool,
    seed: int,
    seconds: float | None = None,
    watch: Watcher | None = None,
) -> Class:
    """Train to the end of the course, or for `seconds` if that is less; the finished class."""
    running = Class(course, decoder=decoder, tower=tower, pool=pool, seed=seed, seconds=seconds)
    while not running.is_over:
        row = running.step()
        if watch is not None:
            watch(running.history.steps, running.steps, row)
    running.model.eval()
    return running
