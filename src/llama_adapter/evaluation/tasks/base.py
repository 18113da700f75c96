"""What a task consists of."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from llama_adapter.errors import EvaluationError
from llama_adapter.evaluation.predictions import Predictions
from llama_adapter.evaluation.records import Record, Row, Tally, Verdict
from llama_adapter.generation import GenerationSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation(GenerationSettings):
    """How answers are generated; every field may be changed on the command line."""

    max_new_tokens: int = 64
    seed: int = 0
    frames: int = 8
    """Frames from a video."""
    prompt: str = "{question}"
    """What is asked, around the task's own question."""
    batch_size: int = 8
    images: Literal["own", "none", "shuffled"] = "own"
    """Each record's own images, none, or those of another record: what a blind model would say."""

    def __post_init__(self) -> None:
        GenerationSettings.__post_init__(self)  # super() does not work with slots=True
        for name in ("frames", "batch_size"):
            if getattr(self, name) < 1:
                raise EvaluationError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """What a task reads: its own file or folder, and whatever may lie elsewhere."""

    data: Path
    baseline: Path | None = None
    """Answers of the other side in a pairwise comparison."""
    split: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Counting:
    """Choices in counting that a user may make."""

    tokenizer: str = "auto"
    """For captions: `ptb` (Java), `simple`, `none`, or `auto`: ptb where Java is installed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Judging:
    """What a judge is asked and how its reply is read."""

    questions: Callable[[Row], Mapping[str, Mapping[str, str]]]
    """From an answered row to the fields of one prompt for each aspect."""
    prompts: Mapping[str, str]
    """By aspect: our own wording, with the fields in braces."""
    parse: Callable[[str, str], Verdict | None]
    """From an aspect and a reply to a verdict; None where the reply cannot be read."""
    system: str = "You grade answers. Follow the requested format to the letter."
    version: str = "1"
    """Counts up whenever a wording changes."""
    is_one_word: bool = False
    """Whether answers are so short that comparing words can replace a judge."""


_SETTINGS = frozenset((
    "data", "model", "endpoint", "device", "predictions", "limit", "shard", "merge",
    "prompt", "max_new_tokens", "temperature", "beams", "seed", "batch_size",
    "expert", "expert_timeout", "expert_tokens", "expert_cache",
))  # fmt: skip
_JUDGE_SETTINGS = frozenset((
    "judge", "judge_url", "judge_model", "judge_prompts", "judge_concurrency",
    "judge_price_in", "judge_price_out",
))  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A benchmark."""

    name: str
    summary: str
    read: Callable[[Inputs], Sequence[Record]]
    """Records from the benchmark's own files."""
    prompts: Callable[[Record], tuple[str, ...]]
    """What the model is asked, one prompt for each question."""
    count: Callable[[Predictions, Counting], Tally]
    """Rows to numbers."""
    read_public: Callable[[Path], Predictions]
    """Answers in the formats of public result files."""
    part: Callable[[Record], str] = lambda _: ""
    """Which part of the benchmark a record belongs to: a limit takes as many of each."""
    media: str = "none"
    """`image`, `video`, `any` or `none`."""
    judging: Judging | None = None
    generation: Generation = field(default_factory=Generation)
    inputs: tuple[str, ...] = ()
    """Which fields of `Inputs` it reads besides `data`."""

    @property
    def options(self) -> frozenset[str]:
        """The options of `llama-adapter eval` that it reads; any other is refused."""
        shown = ("media", "images", "frames")
        media = {"none": (), "image": shown[:2]}.get(self.media, shown)
        judged = _JUDGE_SETTINGS if self.judging else ()
        return _SETTINGS.union(self.inputs, media, judged)


def fill(template: str, fields: Mapping[str, str]) -> str:
    """The template with its fields put in, once: braces in what is put in mean nothing.

    >>> fill('{question} {"score": 4}', {"question": "is {answer} right?"})
    'is {answer} right? {"score": 4}'
    """
    names = "|".join(map(re.escape, fields))
    return re.sub(rf"\{{({names})\}}", lambda found: fields[found[1]], template)
