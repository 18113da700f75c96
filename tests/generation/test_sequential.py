"""The engine with one row keeps what the protocol promises."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tests.threads import SECONDS, becomes, before_each_pass, held

from llama_adapter import (
    Conversation,
    LlamaAdapterForConditionalGeneration,
    LlamaAdapterProcessor,
)
from llama_adapter.errors import ConfigError, PromptError, QueueFullError, UnavailableError
from llama_adapter.generation import GenerationSettings
from llama_adapter.generation.answer import answer
from llama_adapter.generation.requests import (
    GenerationRequest,
    Sampling,
    encode_prompt,
)
from llama_adapter.generation.sequential import SequentialEngine

LONG = Sampling(max_tokens=100)


@pytest.fixture(scope="module")
def loaded(adapter_dir: Path) -> tuple[Any, Any]:
    model = LlamaAdapterForConditionalGeneration.from_pretrained(adapter_dir).eval()
    with torch.no_grad():  # gates of a fresh adapter are closed: open ones let it read images
        for name, parameter in model.adapter.named_parameters():
            if "gate" in name:
                parameter.fill_(1.0)
    return model, LlamaAdapterProcessor.from_pretrained(adapter_dir)


def started(loaded: tuple[Any, Any], **options: Any) -> SequentialEngine:
    engine = SequentialEngine(*loaded, name="first", **options)
    assert becomes(lambda: engine.health.state != "starting")
    assert engine.health.state == "ready", engine.health
    return engine


@pytest.fixture(scope="module")
def engine(loaded: tuple[Any, Any]) -> Iterator[SequentialEngine]:
    engine = started(loaded, max_queue=2)
    yield engine
    engine.drain(0)


@pytest.fixture(scope="module")
def conversation() -> Conversation:
    return Conversation.ask("What is it?", images=[Image.new("RGB", (16, 16), "red")])


def ask(engine: Any, talk: Conversation, **options: Any) -> Any:
    prompt = encode_prompt(engine.processor("first"), talk)
    return engine.submit(GenerationRequest(prompt=prompt, adapter="first", **options))


def texts(generation: Any) -> list[str]:
    found = [""] * generation.request.sampling.n
    for part in generation:
        found[part.choice] += part.text
    return found


def test_greedy_answers_are_those_of_generate(loaded, engine, conversation) -> None:
    settings = GenerationSettings(max_new_tokens=12)
    [expected] = answer(*loaded, [conversation], settings, log_probabilities=True)
    sampling = Sampling(max_tokens=12, logprobs=True, top_logprobs=2)
    generation = ask(engine, conversation, sampling=sampling)
    parts = list(generation)
    tokens = [token for part in parts for token in part.tokens]
    assert "".join(part.text for part in parts) == expected.text
    assert tuple(token.token for token in tokens) == expected.tokens
    assert [t.logprob for t in tokens] == pytest.approx(expected.log_probabilities, abs=1e-4)
    assert all(token.top[0] == (token.token, token.logprob) for token in tokens)
    assert parts[-1].finish == expected.finish
    assert generation.usage.completion_tokens == len(expected.tokens)


def test_a_seed_repeats_each_of_several_answers(engine, conversation) -> None:
    warm = Sampling(max_tokens=8, temperature=2.0, seed=3, n=2)
    first, again = (texts(ask(engine, conversation, sampling=warm)) for _ in range(2))
    assert first == again
    assert first[0] != first[1]


def test_a_stop_text_is_not_part_of_the_answer(engine, conversation) -> None:
    [whole] = texts(ask(engine, conversation, sampling=Sampling(max_tokens=12)))
    stop = whole[len(whole) // 2 :][:3]
    generation = ask(engine, conversation, sampling=Sampling(max_tokens=12, stop=(stop,)))
    assert texts(generation) == [whole.partition(stop)[0].strip()]


def test_a_cancelled_request_and_a_late_one_end_early(engine, conversation) -> None:
    with held(engine):
        waiting = ask(engine, conversation, sampling=LONG)
        waiting.cancel()
    assert list(waiting)[-1].finish == "cancelled"
    late = ask(engine, conversation, sampling=LONG, deadline=time.monotonic())
    assert list(late)[-1].finish == "deadline"
    running, passes = [], itertools.count()

    def wait() -> None:
        assert next(passes) < 3 or becomes(lambda: running and running[0].is_cancelled)

    with before_each_pass(engine._model, wait):
        running.append(ask(engine, conversation, sampling=LONG))
        parts = iter(running[0])
        read = [next(parts)]
        running[0].cancel()
        read += parts
    assert read[-1].finish == "cancelled"
    assert 0 < sum(len(part.tokens) for part in read) <= 4


def test_what_cannot_be_done_is_refused_at_once(engine, conversation) -> None:
    with pytest.raises(PromptError, match="max_tokens is 999999; together at most"):
        ask(engine, conversation, sampling=Sampling(max_tokens=999_999))
    with pytest.raises(ConfigError, match="no adapter 'other'; loaded: first"):
        engine.processor("other")
    with pytest.raises(ConfigError, match="the only adapter"):
        engine.unload_adapter("first")
    with held(engine):
        accepted = [ask(engine, conversation, sampling=Sampling(max_tokens=2)) for _ in range(2)]
        with pytest.raises(QueueFullError, match="2 requests wait"):
            ask(engine, conversation, sampling=LONG)
    assert all(texts(generation) for generation in accepted)


def test_adapters_come_and_go(engine, conversation, adapter_dir) -> None:
    [before] = texts(ask(engine, conversation, sampling=Sampling(max_tokens=8)))
    engine.load_adapter("second", adapter_dir)
    assert engine.adapters == ("first", "second")
    prompt = encode_prompt(engine.processor("second"), conversation)
    other = engine.submit(
        GenerationRequest(prompt=prompt, adapter="second", sampling=Sampling(max_tokens=8))
    )
    assert texts(other)
    assert texts(ask(engine, conversation, sampling=Sampling(max_tokens=8))) == [before]
    engine.unload_adapter("second")
    assert engine.adapters == ("first",)


def test_an_adapter_is_loaded_between_two_requests_however_many_wait(
    loaded, conversation, adapter_dir, monkeypatch
) -> None:
    engine = started(loaded)
    generate, known = type(loaded[0]).generate, []

    def last_until_a_call_waits(*arguments: Any, **options: Any) -> Any:
        known.append("second" in engine.adapters)
        assert len(known) > 1 or becomes(lambda: len(engine._calls))
        return generate(*arguments, **options)

    monkeypatch.setattr(type(loaded[0]), "generate", last_until_a_call_waits)
    waiting = [ask(engine, conversation, sampling=Sampling(max_tokens=2)) for _ in range(6)]
    assert becomes(lambda: known)
    engine.load_adapter("second", adapter_dir)
    assert all(texts(generation) for generation in waiting)
    assert known == [False] + [True] * 5
    engine.unload_adapter("second")
    engine.drain(0)


def test_a_request_whose_adapter_is_gone_or_exchanged_fails_alone(
    loaded, conversation, adapter_dir
) -> None:
    engine = started(loaded)
    engine.load_adapter("second", adapter_dir)
    old = engine.processor("second")
    asked = GenerationRequest(
        prompt=encode_prompt(old, conversation),
        adapter="second",
        sampling=Sampling(max_tokens=2),
        encoded_by=old,
    )
    assert texts(engine.submit(asked))
    with held(engine):
        late = engine.submit(asked)
        engine._calls.put(lambda: engine._forget("second"))
    with pytest.raises(ConfigError, match="no adapter 'second'"):
        list(late)
    engine.load_adapter("second", adapter_dir)
    with pytest.raises(UnavailableError, match="has just been exchanged"):
        engine.submit(asked)
    assert texts(ask(engine, conversation, sampling=Sampling(max_tokens=2)))
    engine.unload_adapter("second")
    engine.drain(0)


def test_a_request_that_fails_fails_alone(loaded, conversation, monkeypatch) -> None:
    engine = started(loaded)
    monkeypatch.setattr(type(loaded[0]), "generate", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(ask(engine, conversation, sampling=Sampling(max_tokens=2)))
    monkeypatch.undo()
    assert texts(ask(engine, conversation, sampling=Sampling(max_tokens=2)))
    assert engine.health.state == "ready"
    engine.drain(0)


def test_an_engine_that_cannot_warm_up_is_dead_and_says_so(
    loaded, conversation, adapter_dir, monkeypatch
) -> None:
    monkeypatch.setattr(type(loaded[0]), "generate", lambda *_, **__: 1 / 0)
    engine = SequentialEngine(*loaded, name="first")
    engine._thread.join(SECONDS)
    assert engine.health.state == "dead"
    assert "ZeroDivisionError" in engine.health.reason
    with pytest.raises(UnavailableError, match="dead"):
        ask(engine, conversation)
    with pytest.raises(UnavailableError, match="dead"):
        engine.load_adapter("second", adapter_dir)
    engine.drain(0)


def test_draining_ends_what_runs_and_takes_nothing_new(loaded, conversation) -> None:
    engine = started(loaded)
    with before_each_pass(
        engine._model, lambda: becomes(lambda: engine.health.state == "draining")
    ):
        running = [ask(engine, conversation, sampling=LONG) for _ in range(3)]
        engine.drain(0.0)
    assert [list(generation)[-1].finish for generation in running] == ["deadline"] * 3
    with pytest.raises(UnavailableError, match="draining"):
        ask(engine, conversation)
