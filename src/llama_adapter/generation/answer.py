"""Conversations in, answers out: the one place that calls `generate`.

Chat, evaluation, held-out scores during training, the caption expert and the local judge all
answer here, so that stop strings, padding, seeds and deadlines mean the same to each.

Shape suffixes: B rows, T tokens, A tokens of answers, V vocabulary.
"""

from __future__ import annotations

import re
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Literal, Self, TypedDict, Unpack

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from llama_adapter.conversation import Conversation
from llama_adapter.errors import ConfigError, LlamaAdapterError
from llama_adapter.generation.settings import GenerationSettings
from llama_adapter.model import LlamaAdapterForConditionalGeneration, answer_mask
from llama_adapter.processing.encoding import pad_id
from llama_adapter.processing.processor import LlamaAdapterProcessor

Finish = Literal["stop", "length", "deadline"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What the model wrote after one prompt."""

    text: str
    tokens: tuple[int, ...]
    """New tokens, the end of the answer included."""
    prompt_tokens: int
    finish: Finish
    """Why it ends: the model ended it, `max_new_tokens` are reached, or the deadline has passed."""
    log_probabilities: tuple[float, ...] | None = None
    """Of each token before temperature and top_p, where they were asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Likelihood:
    """How likely the model finds the answer that a conversation holds."""

    tokens_A: Tensor
    logits_AV: Tensor
    """What the model predicts for each of the tokens, in float32."""

    @property
    def log_probabilities_A(self) -> Tensor:
        """Log-probability of each token after those before it."""
        return self.logits_AV.log_softmax(-1).gather(1, self.tokens_A[:, None]).squeeze(1)

    @property
    def is_greedy(self) -> bool:
        """Whether greedy decoding gives exactly this answer: every token is the likeliest."""
        return torch.equal(self.logits_AV.argmax(-1), self.tokens_A)


class Options(TypedDict, total=False):
    """What may be said of one call, apart from how tokens are chosen."""

    seed: int | None
    """Sampling starts from it and leaves the random state as it was; None: goes on from there."""
    deadline: float | None
    """When all answers end where they are, in the time of `time.monotonic`."""
    log_probabilities: bool
    """Whether answers have the log-probabilities of their tokens."""
    is_cancelled: Callable[[], bool] | None
    """Asked before each token: whether to end where the answers are."""
    streamer: BaseStreamer | None
    """Takes the tokens of a single answer as they are generated."""
    synced_gpus: bool | None
    """For a model in shards: no process ends before the last one has."""


def answer(
    model: LlamaAdapterForConditionalGeneration,
    processor: LlamaAdapterProcessor,
    conversations: Sequence[Conversation],
    settings: GenerationSettings | None = None,
    **options: Unpack[Options],
) -> list[Answer]:
    """Answers of one batch, in order."""
    inputs = processor(list(conversations)).to(model.device)
    return answer_inputs(model, processor, inputs, settings, **options)


def answer_each(
    model: LlamaAdapterForConditionalGeneration,
    processor: LlamaAdapterProcessor,
    conversations: Sequence[Conversation],
    settings: GenerationSettings | None = None,
    **options: Unpack[Options],
) -> list[Answer | LlamaAdapterError]:
    """Like `answer`, but a prompt that cannot be answered costs only its own answer.

    The batch is tried as a whole; where one prompt spoils it, each is answered alone.
    """
    try:
        return [*answer(model, processor, conversations, settings, **options)]
    except LlamaAdapterError as error:
        if len(conversations) == 1:
            return [error]
    return [answer_each(model, processor, [c], settings, **options)[0] for c in conversations]


def stream(
    model: LlamaAdapterForConditionalGeneration,
    processor: LlamaAdapterProcessor,
    conversation: Conversation,
    settings: GenerationSettings | None = None,
    **options: Unpack[Options],
) -> Generator[str, None, Answer]:
    """The text of an answer in pieces as they are generated; returns the whole `Answer`.

    Closing the generator ends generation after the current token. ConfigError for beams, whose
    answer is known at the end only.
    """
    if settings is not None and settings.beams > 1:
        raise ConfigError(f"a stream takes beams 1, got {settings.beams}: see `answer`")
    inputs = processor([conversation]).to(model.device)
    written = _Written(processor.tokenizer)
    is_closed = threading.Event()
    options |= {"streamer": written, "is_cancelled": is_closed.is_set}
    found: list[Answer | BaseException] = []

    def work() -> None:
        try:
            found.extend(answer_inputs(model, processor, inputs, settings, **options))
        except BaseException as error:
            found.append(error)
        finally:
            written.texts.put(None)

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    shown = ""
    try:
        while (text := written.texts.get()) is not None:
            settled = settled_text(text, processor.ends)
            if len(settled) > len(shown):
                yield settled[len(shown) :]
                shown = settled
    finally:
        is_closed.set()
        worker.join()
    [result] = found
    if isinstance(result, BaseException):
        raise result
    if rest := result.text[len(shown) :]:
        yield rest
    return result


def complete(
    model: Any,
    tokenizer: Any,
    prompt: str,
    settings: GenerationSettings | None = None,
    **options: Unpack[Options],
) -> Answer:
    """What any causal language model of transformers writes after a text."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    inputs.pop("token_type_ids", None)
    [found] = _generate(model, tokenizer, inputs, settings or GenerationSettings(), **options)
    return found


def answer_inputs(
    model: LlamaAdapterForConditionalGeneration,
    processor: LlamaAdapterProcessor,
    inputs: Mapping[str, Any],
    settings: GenerationSettings | None = None,
    **options: Unpack[Options],
) -> list[Answer]:
    """Like `answer`, for inputs that are made already, such as features of images."""
    return _generate(
        model,
        processor.tokenizer,
        {**inputs, **processor.stop_options},
        settings or GenerationSettings(),
        finished=processor.without_end,
        **options,
    )


@torch.no_grad()
def log_likelihoods(
    model: LlamaAdapterForConditionalGeneration,
    processor: LlamaAdapterProcessor,
    conversations: Sequence[Conversation],
) -> list[Likelihood]:
    """How likely the model finds the answers in conversations, their ends included, as a batch."""
    return log_likelihoods_of_inputs(
        model, processor(list(conversations), labels=True).to(model.device)
    )


@torch.no_grad()
def log_likelihoods_of_inputs(
    model: LlamaAdapterForConditionalGeneration, inputs: Mapping[str, Any]
) -> list[Likelihood]:
    """Like `log_likelihoods`, for inputs with `labels` that are made already."""
    labels_BT = inputs["labels"]
    without_labels = {name: value for name, value in inputs.items() if name != "labels"}
    scored_BT = answer_mask(labels_BT)
    logits = model(**without_labels, logits_to_keep=scored_BT, use_cache=False).logits[0].float()
    tokens = labels_BT.roll(-1, dims=1)[scored_BT].to(logits.device)
    counts = scored_BT.sum(1).tolist()
    return [
        Likelihood(tokens_A=tokens_A, logits_AV=logits_AV)
        for tokens_A, logits_AV in zip(tokens.split(counts), logits.split(counts), strict=True)
    ]


def _generate(
    model: Any,
    tokenizer: Any,
    inputs: Mapping[str, Any],
    settings: GenerationSettings,
    *,
    finished: Callable[[str], str] = str,
    seed: int | None = None,
    deadline: float | None = None,
    log_probabilities: bool = False,
    is_cancelled: Callable[[], bool] | None = None,
    **options: Any,
) -> list[Answer]:
    """Generate, cut each row where its answer ends, and decode; `finished` cleans the text."""
    if is_cancelled is not None or deadline is not None:
        options["stopping_criteria"] = [_must_end(deadline, is_cancelled)]
    if log_probabilities:
        if settings.beams > 1:
            raise ConfigError(f"log_probabilities take beams 1, got {settings.beams}")
        options |= {"output_logits": True, "return_dict_in_generate": True}
    with nullcontext() if seed is None else torch.random.fork_rng():
        if seed is not None:
            torch.manual_seed(seed)
        output = model.generate(
            **inputs, **settings.as_keywords(), **options, pad_token_id=pad_id(tokenizer)
        )
    sequences, logits = (output.sequences, output.logits) if log_probabilities else (output, ())
    ends = _Ends.of(model, tokenizer, inputs)
    answers = []
    for row, ids in enumerate(sequences[:, inputs["input_ids"].shape[1] :].tolist()):
        tokens, is_ended = ends.cut(ids)
        is_full = len(tokens) >= settings.max_new_tokens
        answers.append(
            Answer(
                text=finished(ends.text_before(tokens)),
                tokens=tuple(tokens),
                prompt_tokens=int(inputs["attention_mask"][row].sum()),
                finish="stop" if is_ended else "length" if is_full else "deadline",
                log_probabilities=_of_row(logits, row, tokens) if log_probabilities else None,
            )
        )
    return answers


def _must_end(
    deadline: float | None, is_cancelled: Callable[[], bool] | None
) -> Callable[..., Tensor]:
    """A stopping criterion for all rows at once."""

    def must_end(tokens_BT: Tensor, _scores: Any, **_: Any) -> Tensor:
        is_late = deadline is not None and time.monotonic() >= deadline
        is_over = is_late or (is_cancelled is not None and is_cancelled())
        return torch.full((len(tokens_BT),), is_over, device=tokens_BT.device)

    return must_end


@dataclass(frozen=True, kw_only=True, slots=True)
class _Ends:
    """What ends answers: tokens, and texts of several tokens."""

    ids: frozenset[int]
    texts: Sequence[str]
    tokenizer: Any

    @classmethod
    def of(cls, model: Any, tokenizer: Any, inputs: Mapping[str, Any]) -> Self:
        """Those of a call of `generate`."""
        found = inputs.get("eos_token_id", model.generation_config.eos_token_id)
        ids = frozenset([found] if isinstance(found, int) else found or ())
        return cls(ids=ids, texts=inputs.get("stop_strings", ()), tokenizer=tokenizer)

    def cut(self, tokens: list[int]) -> tuple[list[int], bool]:
        """A row's tokens up to what ends the answer, and whether something does.

        What follows fills the row up until the other rows' answers are done.
        """
        last = next((i for i, token in enumerate(tokens) if token in self.ids), None)
        if last is not None:
            tokens = tokens[: last + 1]
        if not self._holds_end(tokens):
            return tokens, last is not None
        counts = range(1, len(tokens) + 1)
        first = bisect_left(counts, True, key=lambda count: self._holds_end(tokens[:count]))
        return tokens[: counts[first]], True

    def _holds_end(self, tokens: list[int]) -> bool:
        text = self.tokenizer.decode(tokens) if self.texts else ""
        return any(end in text for end in self.texts)

    def text_before(self, tokens: list[int]) -> str:
        """The text up to the end, of which the last token may hold more than the end."""
        return text_before(self.tokenizer.decode(tokens, skip_special_tokens=True), self.texts)


def text_before(text: str, ends: Sequence[str]) -> str:
    """The text up to the first of its ends."""
    for end in ends:
        text = text.partition(end)[0]
    return text


def _of_row(logits: Sequence[Tensor], row: int, tokens: list[int]) -> tuple[float, ...]:
    """Log-probabilities of a row's tokens from the logits [B, V] of each step."""
    return tuple(
        float(step_BV[row].float().log_softmax(-1)[token])
        for step_BV, token in zip(logits, tokens, strict=False)
    )


class _Written(BaseStreamer):
    """Hands the text so far from the thread that generates to the one that reads."""

    def __init__(self, tokenizer: Any) -> None:
        self.texts: SimpleQueue[str | None] = SimpleQueue()
        self._tokenizer = tokenizer
        self._tokens: list[int] | None = None

    def put(self, value: Tensor) -> None:
        """Take new tokens; the first call brings the prompt."""
        if self._tokens is None:
            self._tokens = []
            return
        self._tokens += value.flatten().tolist()
        self.texts.put(self._tokenizer.decode(self._tokens, skip_special_tokens=True))

    def end(self) -> None:
        """The answer itself says what is left."""


_LAST_WORD = re.compile(r"[^\s\u2e80-\u9fff\uac00-\ud7a3]+$")
"""An unfinished word, of which later tokens may make another; scripts without spaces have none."""


def settled_text(text: str, ends: Sequence[str]) -> str:
    """What of an unfinished answer stays, however it goes on.

    >>> settled_text(" a red # st", ["# #"])
    'a red'
    """
    text = _LAST_WORD.sub("", text_before(text, ends)).strip()
    while held := max((_overlap(text, end) for end in ends), default=0):
        text = text[:-held].rstrip()
    return text


def _overlap(text: str, end: str) -> int:
    """How many characters at the end of a text may begin an end."""
    return max((n for n in range(1, len(end)) if text.endswith(end[:n])), default=0)
