"""Having answers judged: each prompt once, every raw reply kept, verdicts read by pattern."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llama_adapter.errors import EvaluationError
from llama_adapter.evaluation.jsonfiles import brief, lines_to_append, read_json
from llama_adapter.evaluation.judges import WORD_JUDGES, Judge, JudgeUnavailableError
from llama_adapter.evaluation.predictions import JUDGMENTS, asked_as, read_judgments
from llama_adapter.evaluation.records import Row
from llama_adapter.evaluation.tasks.base import Judging, Task, fill
from llama_adapter.files import JsonLines, read_bytes

ATTEMPTS = 3
"""A reply that cannot be read is asked for again twice."""
_KEPT = ("id", "aspect", "prompt_hash", "attempt", "reply", "verdict")
"""Of a verdict that is written once more: it cost nothing the second time."""
_Key = tuple[str, str, str | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgeReport:
    """What judging cost and what it could not do."""

    asked: int
    kept: int
    """Verdicts that an earlier run had stored."""
    prompt_tokens: int
    completion_tokens: int
    unreadable: tuple[str, ...]
    """`id/aspect` whose replies could not be read, three times over."""
    unavailable: tuple[str, ...]
    """`id/aspect` that got no reply: timeouts, refusals for load, broken replies."""
    reasons: Mapping[str, str] = field(default_factory=dict)
    """Why there was no reply, for each of `unavailable`."""

    @property
    def is_without_reply(self) -> bool:
        """Whether prompts were sent and the judge has replied to none, now or in an earlier run."""
        return not self.kept and 0 < self.asked == len(self.unavailable)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Question:
    id: str
    aspect: str
    prompt: str
    system: str

    @property
    def hash(self) -> str:
        """Names the prompt, system text included."""
        return hashlib.sha256(f"{self.system}\n{self.prompt}".encode()).hexdigest()[:16]

    @property
    def key(self) -> _Key:
        return self.id, self.aspect, self.hash

    @property
    def label(self) -> str:
        return f"{self.id}/{self.aspect}"


def judge_rows(
    task: Task,
    rows: Sequence[Row],
    judge: Judge,
    folder: Path,
    *,
    judging: Judging | None = None,
    progress: Callable[[int], object] = lambda _: None,
) -> JudgeReport:
    """Judge every answered row whose verdict is not stored yet; append replies as they come.

    Stored verdicts that another judge's, or this one's on other prompts, came behind are written
    once more: the last ones count.
    """
    judging = judging or _judging_of(task)
    path = folder / JUDGMENTS
    lines = lines_to_append(path)
    stored = _Stored.read(path, task=task.name, judge=judge.name, judging=judging)
    questions = list(_questions(rows, judging))
    pending = [q for q in questions if q.key not in stored.readable]
    progress(len(questions) - len(pending))
    tally = _Tally()
    writer = _Writer(lines, task=task.name, judge=judge.name, version=judging.version)
    for question in questions:
        line = stored.readable.get(question.key)
        if line is not None and question.key not in stored.counting:
            writer.write(again=True, **{name: line.get(name) for name in _KEPT})

    def work(question: _Question) -> None:
        _judge_one(question, judge, judging, writer, tally)
        progress(1)

    with ThreadPoolExecutor(max_workers=judge.concurrency) as pool:
        futures = [pool.submit(work, question) for question in pending]
        done, waiting = wait(futures, return_when=FIRST_EXCEPTION)
        for future in waiting:
            future.cancel()
        for future in done:
            future.result()
    return JudgeReport(
        asked=len(pending),
        kept=len(questions) - len(pending),
        prompt_tokens=tally.prompt_tokens,
        completion_tokens=tally.completion_tokens,
        unreadable=tuple(sorted(tally.unreadable)),
        unavailable=tuple(sorted(label for label, _ in tally.unavailable)),
        reasons=dict(tally.unavailable),
    )


def compare_words(task: Task, rows: Sequence[Row], name: str, folder: Path) -> JudgeReport:
    """Verdicts of a judge that needs no model, for tasks of short answers."""
    check_word_judge(task, name)
    answered = [row for row in rows if row.is_answered]
    writer = _Writer(lines_to_append(folder / JUDGMENTS), task=task.name, judge=name, version="1")
    for row in answered:
        writer.write(id=row.record.id, aspect="answer", verdict=WORD_JUDGES[name](row))
    return JudgeReport(
        asked=len(answered),
        kept=0,
        prompt_tokens=0,
        completion_tokens=0,
        unreadable=(),
        unavailable=(),
    )


def check_word_judge(task: Task, name: str) -> None:
    """Refuse to compare words for a task whose answers are longer than one."""
    if not _judging_of(task).is_one_word:
        raise EvaluationError(f"{name} is for one-word answers; {task.name} needs a judge")


def read_judge_prompts(task: Task, path: Path) -> Judging:
    """The task's judging in the words of a JSON file: `{aspect: prompt, "system": ...}`.

    Prompts hold fields such as {question}; an aspect that the file lacks is an error.
    """
    judging = _judging_of(task)
    content = read_json(path)
    if not isinstance(content, dict) or not all(isinstance(v, str) for v in content.values()):
        raise EvaluationError(f"{path}: expected an object of texts, found {brief(content)}")
    missing = [aspect for aspect in judging.prompts if aspect not in content]
    if missing:
        raise EvaluationError(f"{path}: lacks the prompt for {', '.join(missing)}")
    return replace(
        judging,
        prompts={aspect: content[aspect] for aspect in judging.prompts},
        system=content.get("system", judging.system),
        version=f"file:{hashlib.sha256(read_bytes(path, error=EvaluationError)).hexdigest()[:12]}",
    )


def _judging_of(task: Task) -> Judging:
    if task.judging is None:
        raise EvaluationError(f"{task.name} is scored by rule and takes no judge")
    return task.judging


def _questions(rows: Iterable[Row], judging: Judging) -> Iterable[_Question]:
    for row in rows:
        if not row.is_answered:
            continue
        for aspect, fields in judging.questions(row).items():
            yield _Question(
                id=row.record.id,
                aspect=aspect,
                prompt=fill(judging.prompts[aspect], fields),
                system=judging.system,
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Stored:
    """What a judge has answered readably before, by record, aspect and prompt."""

    readable: dict[_Key, dict[str, Any]]
    counting: set[_Key]
    """Those that scoring would count as the file stands."""

    @classmethod
    def read(cls, path: Path, *, task: str, judge: str, judging: Judging) -> _Stored:
        lines = read_judgments(path) if path.exists() else []
        lines = [line for line in lines if line.get("task") == task]
        readable: dict[_Key, dict[str, Any]] = {}
        counting: dict[tuple[str, str], str | None] = {}
        is_last = bool(lines) and asked_as(lines[-1]) == (judge, judging.version)
        for line in lines:
            reply, told = line.get("reply"), (line["id"], line["aspect"])
            if line.get("judge") != judge or reply is None:
                continue
            if judging.parse(told[1], reply) is None:
                continue
            readable[*told, line.get("prompt_hash")] = line
            if is_last and line.get("version") == judging.version:
                counting[told] = line.get("prompt_hash")
        return cls(readable=readable, counting={(*k, v) for k, v in counting.items()})


class _Tally:
    """Sums over threads."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.unreadable: list[str] = []
        self.unavailable: list[tuple[str, str]] = []
        """Labels, which several prompts may share, with the reasons."""


class _Writer:
    """Appends lines as they come, one at a time."""

    def __init__(self, lines: JsonLines, **common: str) -> None:
        self._lines = lines
        self._common = common
        self._lock = threading.Lock()

    def write(self, **fields: Any) -> None:
        with self._lock:
            self._lines.append({**self._common, **fields})


def _judge_one(
    question: _Question, judge: Judge, judging: Judging, writer: _Writer, tally: _Tally
) -> None:
    asked = {"id": question.id, "aspect": question.aspect, "prompt_hash": question.hash}
    for attempt in range(ATTEMPTS):
        try:
            reply = judge.ask(question.prompt, system=question.system, attempt=attempt)
        except JudgeUnavailableError as error:
            writer.write(**asked, attempt=attempt, reply=None, verdict=None, error=str(error))
            with tally.lock:
                tally.unavailable.append((question.label, str(error)))
            return
        verdict = judging.parse(question.aspect, reply.text)
        writer.write(
            **asked,
            attempt=attempt,
            reply=reply.text,
            verdict=verdict,
            prompt_tokens=reply.prompt_tokens,
            completion_tokens=reply.completion_tokens,
            seconds=round(reply.seconds, 3),
        )
        with tally.lock:
            tally.prompt_tokens += reply.prompt_tokens
            tally.completion_tokens += reply.completion_tokens
        if verdict is not None:
            return
    with tally.lock:
        tally.unreadable.append(question.label)
