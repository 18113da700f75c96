"""The row engine: each request gets the answer that it gets alone, whatever runs beside it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import random
import shutil
import threading
import time
from typing import Any

import pytest
import torch
from PIL import Image
from tests.threads import SECONDS, becomes, before_each_pass, held
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from llama_adapter.conversation import Conversation
from llama_adapter.errors import (
    ConfigError,
    LlamaAdapterError,
    PromptError,
    QueueFullError,
    UnavailableError,
    UnsupportedModelError,
)
from llama_adapter.generation.answer import answer
from llama_adapter.generation.engine import EngineSettings, RowEngine
from llama_adapter.generation.grammar import Grammars, Matcher
from llama_adapter.generation.pending import PendingAnswer
from llama_adapter.generation.requests import (
    EncodedPrompt,
    Generation,
    GenerationRequest,
    Sampling,
    encode_prompt,
)
from llama_adapter.generation.sampling import Drawer
from llama_adapter.generation.settings import GenerationSettings
from llama_adapter.miniature.bundled import bundled_adapter, load_bundled
from llama_adapter.miniature.rendering import render
from llama_adapter.miniature.scenes import Split, scene_stream

QUESTIONS = (
    "What is in the picture?",
    "How many objects are there?",
    "Describe the picture.",
    "What color is the circle?",
    "Where is the square?",
)


@functools.cache
def pictures() -> list[Image.Image]:
    scenes = scene_stream(0, split=Split.TRAIN)
    return [render(next(scenes), random.Random(i)) for i in range(4)]


@functools.cache
def conversations() -> list[tuple[str | None, Conversation]]:
    """Prompts for both bundled adapters and the base: of several lengths, most with an image."""
    found: list[tuple[str | None, Conversation]] = []
    for i in range(12):
        name = ("v2", "caption", "v2", None)[i % 4]
        question = QUESTIONS[i % 5] + " Tell me more about it." * (i % 3)
        images = [] if name is None or i == 6 else [pictures()[i % 4]]
        found.append((name, Conversation.ask(question, images=images)))
    return found


@functools.cache
def alone() -> list[Any]:
    """What each prompt is answered by itself, through `generate`."""
    settings = GenerationSettings(max_new_tokens=24)
    found = []
    models = {name: load_bundled(name) for name in ("v2", "caption")}
    for name, conversation in conversations():
        model, processor = models[name or "v2"]
        if name is None:
            with model.adapters_disabled():
                found += answer(model, processor, [conversation], settings)
        else:
            found += answer(model, processor, [conversation], settings)
    return found


def start(**settings: Any) -> RowEngine:
    model, processor = load_bundled("v2")
    engine = RowEngine(
        model, processor, name="v2", settings=EngineSettings(context_length=256, **settings)
    )
    engine.load_adapter("caption", bundled_adapter("caption"))
    return engine


@pytest.fixture(scope="module")
def engine():
    engine = start(rows=6, prefill_tokens=16)
    yield engine
    engine.drain(5)


def request(engine: RowEngine, index: int, **sampling: Any) -> GenerationRequest:
    name, conversation = conversations()[index]
    prompt = encode_prompt(engine.processor(name), conversation)
    return GenerationRequest(
        prompt=prompt, adapter=name, sampling=Sampling(**{"max_tokens": 24, **sampling})
    )


def text_of(generation: Generation, choice: int = 0) -> tuple[str, list[int], str]:
    parts = [part for part in generation if part.choice == choice]
    tokens = [token.token for part in parts for token in part.tokens]
    return "".join(part.text for part in parts), tokens, parts[-1].finish or ""


def expected(index: int) -> tuple[str, list[int], str]:
    found = alone()[index]
    return found.text, list(found.tokens), found.finish


def becomes_idle(engine: RowEngine) -> None:
    """No row stays busy: one whose client left is freed at the step after."""
    assert becomes(lambda: not (engine.stats.busy_rows or engine.stats.queued)), engine.stats


def becomes_ready(engine: RowEngine) -> None:
    assert becomes(lambda: engine.health.state != "starting")


def test_requests_of_all_kinds_in_one_batch_are_answered_as_alone(engine):
    generations = [engine.submit(request(engine, i)) for i in range(12)]
    for i, generation in enumerate(generations):
        assert text_of(generation) == expected(i), conversations()[i]
    becomes_idle(engine)


def test_prompts_that_begin_alike_are_not_read_again(engine):
    first = engine.submit(request(engine, 0))
    text, _, _ = text_of(first)
    name, conversation = conversations()[0]
    again = engine.submit(request(engine, 0))
    assert text_of(again) == expected(0)
    assert again.usage.cached_tokens == len(again.request.prompt.input_ids) - 1
    other = Conversation.ask(QUESTIONS[0], images=[pictures()[3]])
    prompt = encode_prompt(engine.processor(name), other)
    generation = engine.submit(
        GenerationRequest(prompt=prompt, adapter=name, sampling=Sampling(max_tokens=24))
    )
    list(generation)
    # nothing behind the first placeholder is shared with another image
    before = next(i for i, image in enumerate(prompt.placeholders) if image >= 0)
    assert 0 < generation.usage.cached_tokens <= before
    turn = conversation.assistant(text).user("And what else?")
    follow_up = engine.submit(
        GenerationRequest(
            prompt=encode_prompt(engine.processor(name), turn),
            adapter=name,
            sampling=Sampling(max_tokens=8),
        )
    )
    list(follow_up)
    assert follow_up.usage.cached_tokens >= len(again.request.prompt.input_ids)


def test_prompts_that_come_together_are_read_before_their_answers_go_on():
    model, processor = load_bundled("v2")
    settings = EngineSettings(rows=6, context_length=256, prefill_tokens=96)
    engine = RowEngine(model, processor, name="v2", settings=settings)
    becomes_ready(engine)
    shapes: list[tuple[int, int]] = []
    model.language_model.register_forward_pre_hook(
        lambda *call: shapes.append(tuple(call[2]["input_ids"].shape)), with_kwargs=True
    )
    prompts = [i for i in range(12) if conversations()[i][0] == "v2"]
    with engine._changed:  # they come at once: the engine's thread waits for it
        generations = [engine.submit(request(engine, i)) for i in prompts]
    answers = [text_of(generation) for generation in generations]
    assert answers == [expected(i) for i in prompts]
    first = shapes.index(next(shape for shape in shapes if shape[1] == 1))
    assert all(tokens > 1 for _, tokens in shapes[:first])
    # each token of all of them in one pass, up to the longest answer
    assert [rows for rows, _ in shapes[first:]] == sorted(
        (rows for rows, _ in shapes[first:]), reverse=True
    )
    assert shapes[first] == (len(prompts), 1)
    assert len(shapes) - first == max(len(tokens) for _, tokens, _ in answers) - 1
    engine.drain(5)


def test_several_answers_to_one_prompt(engine):
    generation = engine.submit(request(engine, 0, n=3, temperature=4.0, seed=5))
    parts = list(generation)
    texts = ["".join(p.text for p in parts if p.choice == i) for i in range(3)]
    assert len(set(texts)) > 1
    assert sum(p.finish is not None for p in parts) == 3
    greedy = engine.submit(request(engine, 0, n=2))
    parts = list(greedy)
    for choice in range(2):
        assert "".join(p.text for p in parts if p.choice == choice) == expected(0)[0]


def test_a_seed_repeats_an_answer_whatever_runs_beside_it(engine):
    options = {"temperature": 4.0, "top_p": 0.95, "top_k": 50, "min_p": 0.01, "seed": 7}
    lonely = text_of(engine.submit(request(engine, 0, **options)))
    others = [engine.submit(request(engine, i, temperature=1.0)) for i in range(1, 6)]
    assert text_of(engine.submit(request(engine, 0, **options))) == lonely
    for other in others:
        list(other)
    assert text_of(engine.submit(request(engine, 0, **{**options, "seed": 8}))) != lonely


def test_stop_texts_end_an_answer_and_are_not_part_of_it(engine):
    whole = expected(2)[0]
    word = whole.split()[3]
    text, _, finish = text_of(engine.submit(request(engine, 2, stop=(word, "never"))))
    assert finish == "stop"
    assert text == whole.partition(word)[0].strip()


def test_log_probabilities_are_those_of_the_model(engine):
    parts = list(engine.submit(request(engine, 0, logprobs=True, top_logprobs=3, max_tokens=5)))
    tokens = [token for part in parts for token in part.tokens]
    model, processor = load_bundled("v2")
    _, conversation = conversations()[0]
    [found] = answer(
        model,
        processor,
        [conversation],
        GenerationSettings(max_new_tokens=5),
        log_probabilities=True,
    )
    assert [t.token for t in tokens] == list(found.tokens)
    assert [t.logprob for t in tokens] == pytest.approx(list(found.log_probabilities), abs=1e-4)
    for token in tokens:
        assert token.top[0] == (token.token, token.logprob)
        assert len(token.top) == 3


def test_an_answer_follows_a_json_schema(engine):
    pytest.importorskip("xgrammar", reason="pip install 'llama-adapter[grammar]'")
    schema = {
        "type": "object",
        "properties": {"kind": {"enum": ["a", "b"]}, "big": {"type": "boolean"}},
        "required": ["kind", "big"],
        "additionalProperties": False,
    }
    asked = request(engine, 0, json_schema=json.dumps(schema), max_tokens=60)
    plain = engine.submit(request(engine, 0))
    text, _, finish = text_of(engine.submit(asked))
    assert finish == "stop"
    assert json.loads(text)["kind"] in "ab"
    assert text_of(plain) == expected(0)
    text, _, _ = text_of(engine.submit(request(engine, 0, grammar='root ::= "red" | "blue"')))
    assert text in ("red", "blue")
    outside = '{"type": "array", "items": [{"$ref": "file:///etc/kinds.json"}]}'
    wrongs = ({"json_schema": "{"}, {"json_schema": outside}, {"grammar": "root ::= nowhere"})
    for wrong in wrongs:
        with pytest.raises(ConfigError, match="cannot be used"):
            list(engine.submit(request(engine, 0, **wrong)))
    with pytest.raises(ConfigError, match="must have at most 16384 characters"):
        engine.submit(request(engine, 0, grammar="a" * 70_000))
    deep = '{"type": "array", "items": ' * 200 + "{}" + "}" * 200
    with pytest.raises(ConfigError, match="at most 100 levels"):
        engine.submit(request(engine, 0, json_schema=deep))


def test_a_grammar_that_no_token_goes_on_with_is_refused():
    """Not answered with what it rules out."""
    pytest.importorskip("xgrammar", reason="pip install 'llama-adapter[grammar]'")
    backend = Tokenizer(models.BPE({"a": 0, "b": 1, "</s>": 2}, []))
    grammars = Grammars(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"), 3)
    compiled = grammars.compile(Sampling(grammar='root ::= "a" "c"'))
    assert compiled is not None
    matcher = Matcher(compiled.result(), [2], 3)
    matcher.restrict(logits := torch.zeros(3))
    assert logits.argmax() == 0
    matcher.take(0)
    with pytest.raises(ConfigError, match="no token of this model"):
        matcher.restrict(torch.zeros(3))


def test_a_grammar_is_made_ready_by_a_thread_of_its_own(monkeypatch):
    """Importing xgrammar takes seconds, in which a server's event loop would answer nobody."""
    pytest.importorskip("xgrammar", reason="pip install 'llama-adapter[grammar]'")
    gate = threading.Event()
    begin = Grammars._start
    monkeypatch.setattr(Grammars, "_start", lambda self: gate.wait(SECONDS) and begin(self))
    engine = start(rows=2)
    becomes_ready(engine)
    waiting = engine.submit(request(engine, 0, grammar='root ::= "red" | "blue"'))
    assert text_of(engine.submit(request(engine, 1))) == expected(1)
    assert not waiting.is_done
    gate.set()
    assert text_of(waiting)[0] in ("red", "blue")
    engine.drain(5)


def test_a_request_made_for_an_adapter_that_was_exchanged_is_refused():
    engine = start(rows=2)
    becomes_ready(engine)
    asked = dataclasses.replace(request(engine, 1), encoded_by=engine.processor("caption"))
    assert text_of(engine.submit(asked)) == expected(1)
    engine.unload_adapter("caption")
    engine.load_adapter("caption", bundled_adapter("caption"))
    with pytest.raises(UnavailableError, match="'caption' has just been exchanged"):
        engine.submit(asked)
    engine.drain(5)


def test_images_in_use_stay_in_a_bank_that_is_too_small_for_all():
    engine = start(rows=6, images=2)
    becomes_ready(engine)
    generations = [engine.submit(request(engine, i)) for i in range(12)]
    assert [text_of(one) for one in generations] == [expected(i) for i in range(12)]
    assert len(engine._images) <= 2
    assert engine._stack.free_images + len(engine._images) == 2
    engine.drain(5)


def test_a_row_that_cannot_be_claimed_costs_what_runs_and_not_what_waits(engine, monkeypatch):
    claim, claimed = engine._cache.claim, []

    def refuse(*place: Any, **options: Any) -> Any:
        claimed.append(place)
        if len(claimed) == 2:
            raise RuntimeError("no row")
        return claim(*place, **options)

    with held(engine):
        generations = [engine.submit(request(engine, i)) for i in range(4)]
        monkeypatch.setattr(engine._cache, "claim", refuse)
    for generation in generations[:2]:
        with pytest.raises(RuntimeError, match="no row"):
            list(generation)
    assert [text_of(one) for one in generations[2:]] == [expected(2), expected(3)]
    becomes_idle(engine)
    assert not any(image.users for image in engine._images.values())


def test_what_does_not_fit_is_refused_at_once(engine):
    with pytest.raises(PromptError, match="together at most 256 fit"):
        engine.submit(request(engine, 0, max_tokens=250))
    with pytest.raises(PromptError, match="no tokens"):
        engine.submit(GenerationRequest(prompt=EncodedPrompt(input_ids=())))
    with pytest.raises(ConfigError, match="no adapter 'v3'; loaded: v2, caption"):
        engine.submit(GenerationRequest(prompt=EncodedPrompt(input_ids=(1,)), adapter="v3"))
    with pytest.raises(ConfigError, match="n must be at most 64, got 65"):
        engine.submit(request(engine, 0, n=65))


def test_cancelled_and_late_requests_free_their_rows(engine):
    cancelled = engine.submit(request(engine, 0, max_tokens=150, grammar=None))
    late = GenerationRequest(
        prompt=request(engine, 2).prompt,
        adapter="v2",
        sampling=Sampling(max_tokens=150),
        deadline=time.monotonic() - 1,
    )
    late = engine.submit(late)
    cancelled.cancel()
    assert text_of(late)[2] == "deadline"
    assert text_of(cancelled)[2] in ("cancelled", "stop")
    assert text_of(engine.submit(request(engine, 1))) == expected(1)


def poison(engine: RowEngine, token: int) -> Any:
    """Let every pass fail that reads a token."""
    base = engine._stack.language_model
    embed = base.get_input_embeddings()

    def refuse(_module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        if (inputs[0] == token).any():
            raise RuntimeError("poisoned")

    return embed.register_forward_pre_hook(refuse)


def test_a_request_that_fails_fails_alone(engine):
    poisoned = 500
    hook = poison(engine, poisoned)
    try:
        bad = GenerationRequest(
            prompt=EncodedPrompt(input_ids=(1, 5, 6, poisoned, 7), placeholders=(-1,) * 5),
            adapter="v2",
            sampling=Sampling(max_tokens=8),
        )
        generations = [engine.submit(request(engine, i)) for i in range(3)]
        failing = [engine.submit(bad), engine.submit(bad)]
        generations += [engine.submit(request(engine, i)) for i in range(3, 6)]
        for generation in failing:
            with pytest.raises(RuntimeError, match="poisoned"):
                list(generation)
        for i, generation in enumerate(generations):
            assert text_of(generation) == expected(i)
    finally:
        hook.remove()
    assert engine.health.state == "ready"


def test_bad_requests_alone_do_not_end_the_engine(engine):
    bad = EncodedPrompt(input_ids=(1, 5, 500, 7))
    asked = GenerationRequest(prompt=bad, adapter="v2", sampling=Sampling(max_tokens=8))
    hook = poison(engine, 500)
    try:
        for _ in range(10):
            with pytest.raises(RuntimeError, match="poisoned"):
                list(engine.submit(asked))
    finally:
        hook.remove()
    assert engine.health.state == "ready"
    assert text_of(engine.submit(request(engine, 0))) == expected(0)


def test_one_of_several_answers_that_fails_ends_its_request_alone(engine):
    """Also in the step in which another of them would have ended by itself."""
    options = {"temperature": 9.0, "seed": 3, "n": 3}
    increments = list(engine.submit(request(engine, 0, **options)))
    drawn = [[t.token for i in increments if i.choice == c for t in i.tokens] for c in range(3)]
    length = min(map(len, drawn[1:]))
    others = {*drawn[0], *drawn[2], *request(engine, 0).prompt.input_ids}
    at = next(i for i, token in enumerate(drawn[1][: length - 1]) if token not in others)
    hook = poison(engine, drawn[1][at])
    try:
        failing = engine.submit(request(engine, 0, **options, max_tokens=at + 2))
        with pytest.raises(RuntimeError, match="poisoned"):
            list(failing)
    finally:
        hook.remove()
    becomes_idle(engine)
    good = [engine.submit(request(engine, i)) for i in range(6)]
    assert [text_of(one) for one in good] == [expected(i) for i in range(6)]
    becomes_idle(engine)


def test_an_answer_that_cannot_be_drawn_fails_alone(engine, monkeypatch):
    take = Drawer.take

    def refuse(drawer: Drawer, token: int) -> None:
        if drawer.sampling.seed == 13:
            raise ValueError("unlucky")
        take(drawer, token)

    monkeypatch.setattr(Drawer, "take", refuse)
    generations = [engine.submit(request(engine, i)) for i in range(3)]
    with pytest.raises(ValueError, match="unlucky"):
        list(engine.submit(request(engine, 3, seed=13)))
    for i, generation in enumerate(generations):
        assert text_of(generation) == expected(i)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_numbers_change_no_draw_of_others(engine, monkeypatch, value):
    options = {"temperature": 9.0, "seed": 3}
    before = text_of(engine.submit(request(engine, 0, **options)))
    run = engine._model.run

    def spoil(first: int, chunks: Any) -> torch.Tensor:
        logits_NV = run(first, chunks)
        for logits_V, chunk in zip(logits_NV, chunks, strict=True):
            if chunk.reads.adapter == 0 and chunk.start == 8:  # while the other goes on
                logits_V.fill_(value)
        return logits_NV

    monkeypatch.setattr(engine._model, "run", spoil)
    good = engine.submit(request(engine, 0, **options))
    prompt = EncodedPrompt(input_ids=(1, 5, 6, 7, 8))
    sampling = Sampling(max_tokens=24, temperature=9.0, seed=4)
    bad = engine.submit(GenerationRequest(prompt=prompt, sampling=sampling))
    with pytest.raises(RuntimeError, match="not numbers"):
        list(bad)
    assert text_of(good) == before
    becomes_idle(engine)


def test_an_image_that_cannot_be_read_fails_alone(engine):
    asked = request(engine, 0)
    [image] = asked.prompt.images
    odd = type(image)(key="odd", pixel_values=torch.zeros(2, 8, 8))
    prompt = EncodedPrompt(
        input_ids=asked.prompt.input_ids,
        placeholders=asked.prompt.placeholders,
        images=(odd,),
    )
    good = engine.submit(asked)
    with pytest.raises(UnsupportedModelError, match="cannot read an image of 8x8 pixels"):
        list(engine.submit(dataclasses.replace(asked, prompt=prompt)))
    assert text_of(good) == expected(0)


def test_adapters_come_and_go_while_requests_run(engine):
    running = [engine.submit(request(engine, i)) for i in range(4)]
    engine.load_adapter("more", bundled_adapter("caption"))
    assert engine.adapters == ("v2", "caption", "more")
    asked = request(engine, 1)
    other = GenerationRequest(prompt=asked.prompt, adapter="more", sampling=asked.sampling)
    generation = engine.submit(other)
    engine.unload_adapter("more")
    assert text_of(generation) == expected(1)
    for i, one in enumerate(running):
        assert text_of(one) == expected(i)
    with pytest.raises(ConfigError, match="no adapter 'more'"):
        engine.submit(other)
    with pytest.raises(ConfigError, match="'v2' is loaded already"):
        engine.load_adapter("v2", bundled_adapter("v2"))


def test_an_adapter_does_not_leave_before_a_request_that_has_just_come(engine, monkeypatch):
    """Its place would compute as the base does, without a word."""
    engine.load_adapter("more", bundled_adapter("caption"))
    asked = dataclasses.replace(request(engine, 1), adapter="more")
    waiting, taken = engine._waiting, []

    def late() -> list[PendingAnswer]:
        found = waiting()
        if not taken:  # while the engine finds out which adapters are in use
            taken.append(engine.submit(asked))
            threading.Thread(target=engine.unload_adapter, args=("more",)).start()
            while "more" in engine.adapters:
                time.sleep(0.001)
        return found

    monkeypatch.setattr(engine, "_waiting", late)
    assert text_of(engine.submit(request(engine, 0))) == expected(0)
    assert text_of(taken[0]) == expected(1)


def test_a_row_that_becomes_free_under_the_eyes_of_another_thread_is_no_answer(engine, monkeypatch):
    becomes_idle(engine)

    class Row:
        answers = iter([object(), None])

        @property
        def answer(self) -> Any:
            return next(self.answers)

    monkeypatch.setattr(engine._cache, "rows", [Row()])
    assert None not in engine._running()


def test_a_vision_encoder_leaves_with_the_last_adapter_that_looks_through_it(engine, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(bundled_adapter("v2"), other)
    config = json.loads((other / "adapter_config.json").read_text())
    config["vision"]["fingerprint"] = None  # nothing says that it is the same
    (other / "adapter_config.json").write_text(json.dumps(config))
    engine.load_adapter("other", other)
    assert len(engine._encoders) == 2
    engine.unload_adapter("other")
    assert len(engine._encoders) == 1
    assert text_of(engine.submit(request(engine, 0))) == expected(0)


def test_an_adapter_that_cannot_be_loaded_leaves_nothing_on_the_base(tmp_path):
    """The base is shared: what a failed load left there would be in every answer."""
    engine = start(rows=2)
    damaged = tmp_path / "damaged"
    shutil.copytree(bundled_adapter("v2"), damaged)
    path = damaged / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-4:] = b"\x00\x00\xc0\x7f"  # not a number
    path.write_bytes(content)
    with pytest.raises(LlamaAdapterError):
        engine.load_adapter("damaged", damaged)
    engine.load_adapter("again", bundled_adapter("v2"))
    asked = request(engine, 0)
    for name in ("v2", "again"):
        generation = engine.submit(dataclasses.replace(asked, adapter=name))
        assert text_of(generation) == expected(0)
    engine.drain(5)


def test_an_adapter_that_cannot_be_removed_costs_its_caller_alone(monkeypatch):
    engine = start(rows=2)

    def fail(name: str) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(engine, "_forget", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        engine.unload_adapter("caption")
    assert text_of(engine.submit(request(engine, 0))) == expected(0)
    assert engine.health.state == "ready"
    engine.drain(5)


def test_a_full_queue_says_so_at_once_and_a_drained_engine_answers_what_it_took():
    engine = start(rows=1, max_queue=2)
    becomes_ready(engine)
    with held(engine):
        accepted = [engine.submit(request(engine, i)) for i in range(2)]
        with pytest.raises(QueueFullError, match="2 answers wait, and at most 2 may"):
            engine.submit(request(engine, 0))
    engine.drain(SECONDS)
    for i, generation in enumerate(accepted):
        assert text_of(generation) == expected(i)
    with pytest.raises(UnavailableError, match="the engine is draining"):
        engine.submit(request(engine, 0))
    assert not engine._stack.is_attached


def test_draining_ends_what_takes_too_long():
    engine = start(rows=2)
    becomes_ready(engine)
    passes = itertools.count()

    def wait() -> None:
        assert next(passes) < 3 or becomes(lambda: engine.health.state == "draining")

    with before_each_pass(engine._stack, wait):
        running = engine.submit(request(engine, 0))
        parts = iter(running)
        assert next(parts).finish is None  # it has begun
        waiting = [engine.submit(request(engine, i)) for i in range(3)]
        engine.drain(0)
    assert [*parts][-1].finish == "deadline"
    for generation in waiting:
        assert text_of(generation)[2] == "deadline"


def test_a_step_that_crashes_costs_its_requests_and_not_the_engine(monkeypatch):
    engine = start(rows=2)
    becomes_ready(engine)
    monkeypatch.setattr("llama_adapter.generation.engine.draw", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(engine.submit(request(engine, 0)))
    monkeypatch.undo()
    assert text_of(engine.submit(request(engine, 0))) == expected(0)
    monkeypatch.setattr("llama_adapter.generation.engine.draw", lambda *_: 1 / 0)
    for i in range(3):
        with pytest.raises((ZeroDivisionError, UnavailableError)):
            list(engine.submit(request(engine, i)))
    # the engine tries itself once more behind the last answer
    assert becomes(lambda: engine.health.state == "dead")
    assert "ZeroDivisionError" in engine.health.reason


def test_a_step_that_crashes_still_ends_what_had_ended_in_it(engine, monkeypatch):
    with held(engine):
        late = engine.submit(dataclasses.replace(request(engine, 0), deadline=time.monotonic()))
        monkeypatch.setattr(engine, "_admit", lambda: 1 / 0)
    assert text_of(late)[2] == "deadline"
    monkeypatch.undo()
    assert text_of(engine.submit(request(engine, 0))) == expected(0)


def test_answers_that_cannot_be_admitted_fail_alone(engine, monkeypatch):
    """Also those of one prompt that wait together."""
    begin = engine._encode_images

    def refuse(answer: PendingAnswer) -> None:
        if answer.choice == 1:
            raise RuntimeError("no image")
        begin(answer)

    monkeypatch.setattr(engine, "_encode_images", refuse)
    good = [engine.submit(request(engine, i)) for i in range(3)]
    with pytest.raises(RuntimeError, match="no image"):
        list(engine.submit(request(engine, 4, n=4)))
    assert [text_of(one) for one in good] == [expected(i) for i in range(3)]
    becomes_idle(engine)


def test_a_long_prompt_is_read_although_short_ones_keep_coming(engine):
    ended: list[str] = []
    generations: list[Generation] = []

    def submit(name: str, tokens: list[int], most: int) -> None:
        def notify() -> None:
            if generations[index].is_done:
                ended.append(name)

        index = len(generations)
        prompt = EncodedPrompt(input_ids=tuple(tokens))
        asked = GenerationRequest(prompt=prompt, sampling=Sampling(max_tokens=most))
        generations.append(engine.submit(asked, notify=notify))

    with held(engine):
        submit("short", [300, 301, 302], 2)
        submit("long", list(range(300, 500)), 1)
        for i in range(50):
            submit("short", [310 + i, 5, 6], 2)
    for generation in generations:
        list(generation)
    assert ended.index("long") < 40


@pytest.mark.stress
@pytest.mark.parametrize("seed", range(3))
def test_any_interleaving_gives_each_request_its_own_answer(engine, seed):
    """Adapters, images, lengths, cancelled, failing and sampled requests, in any order."""
    rng = random.Random(seed)
    hook = poison(engine, 500)
    bad = EncodedPrompt(input_ids=(1, *rng.choices(range(300, 400), k=9), 500, 7))
    greedy: list[tuple[int, int, Generation]] = []
    others: list[Generation] = []
    try:
        for _ in range(30):
            index, length = rng.randrange(12), rng.choice([1, 3, 9, 24])
            match rng.choice(["greedy", "greedy", "greedy", "cancelled", "failing", "sampled"]):
                case "greedy":
                    generation = engine.submit(request(engine, index, max_tokens=length))
                    greedy.append((index, length, generation))
                case "cancelled":
                    others.append(engine.submit(request(engine, index)))
                    threading.Timer(rng.random() / 5, others[-1].cancel).start()
                case "failing":
                    name = rng.choice([None, "v2", "caption"])
                    sampling = Sampling(max_tokens=length)
                    asked = GenerationRequest(prompt=bad, adapter=name, sampling=sampling)
                    others.append(engine.submit(asked))
                case _:
                    options = {"temperature": 3.0, "n": rng.choice([1, 2, 3])}
                    others.append(engine.submit(request(engine, index, **options)))
            if rng.random() < 0.3:
                time.sleep(rng.random() / 10)
        for index, length, generation in greedy:
            text, tokens, finish = expected(index)
            found = text_of(generation)
            assert found[1] == tokens[:length], conversations()[index]
            if length >= len(tokens):
                assert found == (text, tokens, finish)
        for generation in others:
            if generation.request.prompt is bad:
                with pytest.raises(RuntimeError, match="poisoned"):
                    list(generation)
            else:
                with contextlib.suppress(RuntimeError):  # a sampled answer may draw the token
                    list(generation)
    finally:
        hook.remove()
    becomes_idle(engine)
    assert engine._stack.free_images + len(engine._images) == engine.settings.images
    assert not any(image.users for image in engine._images.values())


def test_a_base_that_is_refused_is_left_as_it_was():
    model, processor = load_bundled("v2")
    model.language_model.generation_config.no_repeat_ngram_size = 3
    with pytest.raises(UnsupportedModelError, match="sets no_repeat_ngram_size"):
        RowEngine(model, processor, name="v2")
    assert model.active_adapters() == ["default"]
