"""One place answers: in batches or alone, in a stream, until a deadline, from a seed."""

from __future__ import annotations

import ast
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import llama_adapter
from llama_adapter import (
    Conversation,
    LlamaAdapterForConditionalGeneration,
    LlamaAdapterProcessor,
)
from llama_adapter.errors import ConfigError, PromptError
from llama_adapter.generation import GenerationSettings
from llama_adapter.generation.answer import (
    Answer,
    answer,
    answer_each,
    answer_inputs,
    log_likelihoods,
    log_likelihoods_of_inputs,
    stream,
)

SHORT = GenerationSettings(max_new_tokens=8)
LONG = GenerationSettings(max_new_tokens=100_000)
WARM = GenerationSettings(max_new_tokens=12, temperature=1.5)


@pytest.fixture(scope="module")
def loaded(adapter_dir: Path) -> tuple[Any, Any]:
    model = LlamaAdapterForConditionalGeneration.from_pretrained(adapter_dir)
    # gates of a fresh adapter are closed: open ones make answers depend on images
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate" in name:
                parameter.fill_(1.0)
    return model.eval(), LlamaAdapterProcessor.from_pretrained(adapter_dir)


def questions() -> list[Conversation]:
    red, green = (Image.new("RGB", (12, 12), color) for color in ((200, 30, 30), (20, 180, 40)))
    return [
        Conversation.ask("who?"),
        Conversation.ask("what do you see in this picture?", images=[red]),
        Conversation.ask("what do you see?", images=[green], context="a star"),
    ]


def whole(pieces: Any) -> tuple[list[str], Answer]:
    """The pieces of a stream and what it returns."""
    found = []
    while True:
        try:
            found.append(next(pieces))
        except StopIteration as stop:
            return found, stop.value


def test_a_batch_gives_what_each_gives_alone(loaded: Any) -> None:
    together = answer(*loaded, questions(), SHORT)
    alone = [answer(*loaded, [question], SHORT)[0] for question in questions()]
    assert together == alone
    assert len({found.tokens for found in together}) == 3, "the images and texts make a difference"
    assert all(1 <= len(found.tokens) <= 8 for found in together)


def test_it_is_what_generate_writes(loaded: Any) -> None:
    model, processor = loaded
    for question, found in zip(questions(), answer(*loaded, questions(), SHORT), strict=True):
        inputs = processor([question])
        tokens = model.generate(
            **inputs, max_new_tokens=8, do_sample=False, **processor.stop_options
        )
        assert tokens[0, inputs["input_ids"].shape[1] :].tolist() == list(found.tokens)
        assert found.prompt_tokens == inputs["input_ids"].shape[1]
        text = processor.tokenizer.decode(found.tokens, skip_special_tokens=True)
        assert found.text == processor.without_end(text)


@pytest.mark.parametrize("index", range(3))
def test_the_pieces_of_a_stream_join_to_the_answer(loaded: Any, index: int) -> None:
    question = questions()[index]
    pieces, found = whole(stream(*loaded, question, GenerationSettings(max_new_tokens=30)))
    assert [found] == answer(*loaded, [question], GenerationSettings(max_new_tokens=30))
    assert "".join(pieces) == found.text
    assert len(pieces) > 1


def test_a_reader_that_goes_away_ends_generation(loaded: Any) -> None:
    before = threading.active_count()
    pieces = stream(*loaded, questions()[0], LONG)
    next(pieces)
    pieces.close()
    assert threading.active_count() <= before


class InvalidRecord:
    """A model whose `generate` fails."""

    def __init__(self, model: Any) -> None:
        self.device, self.generation_config = model.device, model.generation_config

    def generate(self, **_: Any) -> Any:
        raise AttributeError("broken")


def test_what_generation_raises_reaches_the_reader(loaded: Any) -> None:
    model, processor = loaded
    before = threading.active_count()
    with pytest.raises(PromptError):
        next(stream(model, processor, Conversation.ask("who? " * 2000), SHORT))
    with pytest.raises(AttributeError, match="broken"):
        whole(stream(InvalidRecord(model), processor, questions()[0], SHORT))
    assert threading.active_count() <= before


def test_a_deadline_ends_answers_where_they_are(loaded: Any) -> None:
    deadline = time.monotonic() + 0.3
    found = answer(*loaded, questions(), LONG, deadline=deadline)
    assert time.monotonic() < deadline + 5
    assert {one.finish for one in found} <= {"deadline", "stop"}
    _, streamed = whole(stream(*loaded, questions()[0], LONG, deadline=time.monotonic()))
    assert (streamed.finish, len(streamed.tokens)) == ("deadline", 1)
    [in_time] = answer(*loaded, questions()[:1], SHORT, deadline=time.monotonic() + 600)
    assert [in_time] == answer(*loaded, questions()[:1], SHORT)


def test_a_seed_repeats_and_leaves_the_random_state_alone(loaded: Any) -> None:
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    first = answer(*loaded, questions(), WARM, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert answer(*loaded, questions(), WARM, seed=3) == first
    assert answer(*loaded, questions(), WARM, seed=4) != first
    _, streamed = whole(stream(*loaded, questions()[0], WARM, seed=3))
    assert [streamed] == answer(*loaded, questions()[:1], WARM, seed=3)


def test_log_probabilities_are_those_of_a_plain_forward(loaded: Any) -> None:
    model, processor = loaded
    for question in questions():
        [found] = answer(*loaded, [question], SHORT, log_probabilities=True)
        inputs = processor([question])
        length = inputs["input_ids"].shape[1]
        ids = torch.cat([inputs["input_ids"], torch.tensor([found.tokens])], dim=1)
        extended = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.no_grad():
            logits = model(**extended).logits[0, length - 1 : -1].float()
        expected = logits.log_softmax(-1)[range(len(found.tokens)), list(found.tokens)]
        assert found.log_probabilities is not None
        torch.testing.assert_close(torch.tensor(found.log_probabilities), expected)
    assert answer(*loaded, questions(), SHORT)[0].log_probabilities is None


def test_likelihoods_of_given_answers(loaded: Any) -> None:
    model, processor = loaded
    given = [q.assistant(text) for q, text in zip(questions(), ("a", "a star", "b"), strict=True)]
    together = log_likelihoods(*loaded, given)
    for conversation, found in zip(given, together, strict=True):
        inputs = processor([conversation], labels=True)
        labels = inputs.pop("labels")[0, 1:]
        with torch.no_grad():
            logits = model(**inputs).logits[0, :-1].float()
        scored = labels != -100
        assert torch.equal(found.tokens_A, labels[scored])
        expected = logits[scored].log_softmax(-1).gather(1, labels[scored][:, None])[:, 0]
        torch.testing.assert_close(found.log_probabilities_A, expected)
        [alone] = log_likelihoods(*loaded, [conversation])
        torch.testing.assert_close(alone.log_probabilities_A, expected)


def test_an_answer_is_greedy_where_greedy_decoding_writes_it(loaded: Any) -> None:
    model, processor = loaded
    [written] = answer(*loaded, questions()[:1], GenerationSettings(max_new_tokens=1))
    inputs = processor([questions()[0].assistant("x")], labels=True)
    place = int((inputs["labels"][0] != -100).nonzero()[0])
    [likeliest] = written.tokens
    for token, is_greedy in ((likeliest, True), (likeliest - 1, False)):
        changed = {name: tensor[:, : place + 1].clone() for name, tensor in inputs.items()}
        changed["input_ids"][0, place] = changed["labels"][0, place] = token
        [found] = log_likelihoods_of_inputs(model, changed)
        assert found.is_greedy is is_greedy


def test_a_prompt_that_spoils_a_batch_costs_only_its_own_answer(loaded: Any) -> None:
    spoiled = [*questions(), Conversation.ask("?", images=[b"not an image"])]
    found = answer_each(*loaded, spoiled, SHORT)
    assert found[:3] == answer(*loaded, questions(), SHORT)
    assert isinstance(found[3], llama_adapter.ImageError)


def test_inputs_may_be_made_elsewhere(loaded: Any) -> None:
    model, processor = loaded
    inputs = dict(processor(questions()[1:]))
    inputs["visual_prompts"] = model.encode_visual(inputs.pop("pixel_values"))
    assert answer_inputs(model, processor, inputs, SHORT) == answer(*loaded, questions()[1:], SHORT)


def test_nothing_else_calls_generate() -> None:
    root = Path(llama_adapter.__file__).parent
    found = set()
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            called = node.func if isinstance(node, ast.Call) else None
            if isinstance(called, ast.Attribute) and called.attr == "generate":
                found.add(path.relative_to(root).as_posix())
    assert found == {
        "generation/answer.py",
        "generation/sequential.py",
        "model/visual_generation.py",
    }


def test_beams_in_a_batch_answer_as_alone(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    beams = GenerationSettings(max_new_tokens=8, beams=3)
    together = answer(model, processor, questions(), beams)
    for conversation, found in zip(questions(), together, strict=True):
        inputs = processor([conversation])
        ids = model.generate(
            **inputs, **processor.stop_options, max_new_tokens=8, do_sample=False, num_beams=3
        )
        tokens = ids[0, inputs["input_ids"].shape[1] :].tolist()
        assert tuple(tokens[: len(found.tokens)]) == found.tokens
    assert together != answer(model, processor, questions(), SHORT)


def test_what_beams_cannot_do_is_refused(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    beams = GenerationSettings(beams=2)
    with pytest.raises(ConfigError, match=r"beams 2 need temperature 0, got 0\.5"):
        GenerationSettings(beams=2, temperature=0.5)
    with pytest.raises(ConfigError, match="beams must be at least 1, got 0"):
        GenerationSettings(beams=0)
    with pytest.raises(ConfigError, match="a stream takes beams 1, got 2"):
        next(stream(model, processor, questions()[0], beams))
    with pytest.raises(ConfigError, match="log_probabilities take beams 1, got 2"):
        answer(model, processor, questions(), beams, log_probabilities=True)
