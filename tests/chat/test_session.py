"""Chat sessions: streamed or whole, turn after turn, and whole again after a refusal."""

from __future__ import annotations

import threading

import pytest
from PIL import Image

from llama_adapter import LlamaAdapterForConditionalGeneration, LlamaAdapterProcessor
from llama_adapter.chat import ChatSession
from llama_adapter.conversation import Conversation
from llama_adapter.errors import ConfigError, ImageError, PromptError
from llama_adapter.experts import CaptionExpert, ExpertInfo, Finding, Report, Request
from llama_adapter.experts.wording import report_text
from llama_adapter.generation import GenerationSettings
from llama_adapter.generation.answer import answer


@pytest.fixture(scope="module")
def loaded(adapter_dir):
    model = LlamaAdapterForConditionalGeneration.from_pretrained(adapter_dir)
    return model, LlamaAdapterProcessor.from_pretrained(adapter_dir)


@pytest.fixture
def picture():
    return Image.new("RGB", (12, 12), (200, 30, 30))


def session(loaded, **options):
    return ChatSession(*loaded, settings=GenerationSettings(max_new_tokens=6), **options)


def test_a_stream_joins_to_the_whole_answer(loaded, picture):
    streamed = session(loaded)
    pieces = list(streamed.stream("what do you see?", images=[picture]))
    whole = session(loaded).ask("what do you see?", images=[picture])
    assert "".join(pieces).strip() == whole.text == streamed.last_answer.text
    assert 1 <= whole.tokens <= 6
    assert whole.seconds > 0


def test_turns_accumulate_and_reset_forgets(loaded, picture):
    chat = session(loaded)
    chat.ask("what do you see?", images=[picture])
    chat.ask("where is it?")
    assert [m.role for m in chat.conversation.messages] == ["user", "assistant"] * 2
    assert len(chat.conversation.images) == 1
    chat.reset()
    assert chat.conversation is None


def test_a_refused_question_leaves_the_session_as_it_was(loaded, picture):
    chat = session(loaded)
    chat.ask("what do you see?", images=[picture])
    before = chat.conversation
    with pytest.raises(PromptError):
        chat.ask("   ")
    with pytest.raises(ImageError):
        chat.ask("and this?", images=[b"no picture"])
    assert chat.conversation == before


class Loud:
    """An expert that says what it was shown."""

    name = "loud"
    info = ExpertInfo()

    def consult(self, request):
        text = f"{len(request.images)} pictures: {request.question}"
        finding = Finding(text=text, kind="note")
        return Report(expert=self.name, findings=(finding,))


def test_expert_reports_become_context_and_stay(loaded, picture):
    chat = session(loaded, experts=[Loud()], context="a hint")
    answer = chat.ask("what now?", images=[picture])
    assert [report_text(report) for report in answer.contexts] == ["1 pictures: what now?"]
    assert chat.conversation.context == "1 pictures: what now?\na hint"
    chat.ask("and then?")
    assert chat.conversation.context == "1 pictures: what now?\na hint"
    assert [r.expert for r in chat.last_answer.contexts] == ["loud"]


def test_the_caption_expert_gives_the_active_adapter_back(loaded, adapter_dir, picture):
    model, processor = loaded
    if "caption" not in model.adapters:
        model.load_adapter(adapter_dir, "caption")
    before = session(loaded).ask("what do you see?", images=[picture]).text
    expert = CaptionExpert(model, processor, max_new_tokens=4)
    report = expert.consult(Request(images=[picture, picture]))
    assert [finding.image for finding in report.findings] == [0, 1]
    assert report.findings[0].text == report.findings[1].text
    assert model.active_adapter == "default"
    assert session(loaded).ask("what do you see?", images=[picture]).text == before
    assert expert.consult(Request()).findings == ()


def test_captions_by_beams_are_those_of_an_answer_by_beams(loaded, picture):
    model, processor = loaded
    expert = CaptionExpert(
        model, processor, adapter_name="default", instruction="say", max_new_tokens=8, beams=3
    )
    [finding] = expert.consult(Request(images=[picture])).findings
    prompts = [Conversation.ask("say", images=[picture])]
    found = [
        answer(model, processor, prompts, GenerationSettings(max_new_tokens=8, beams=beams))[0].text
        for beams in (3, 1)
    ]
    assert finding.text == found[0] != found[1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"temperature": -1.0}, "temperature must be at least 0"),
        ({"temperature": float("nan")}, "temperature must be at least 0"),
        ({"temperature": float("inf")}, "temperature must be at least 0"),
        ({"top_p": 0.0}, "top_p must be in"),
    ],
)
def test_bad_settings_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        GenerationSettings(**options)


def test_a_reader_that_goes_away_ends_the_answer(loaded):
    session = ChatSession(*loaded, settings=GenerationSettings(max_new_tokens=100_000))
    pieces = session.stream("who?")
    before = threading.active_count()
    next(pieces)
    pieces.close()
    assert session.last_answer is None
    assert threading.active_count() <= before


@pytest.mark.parametrize("temperature", [1e-300, 1e-9])
def test_next_to_no_temperature_takes_the_likeliest(loaded, temperature):
    cold = GenerationSettings(max_new_tokens=6, temperature=temperature)
    likeliest = session(loaded).ask("who?").text
    assert ChatSession(*loaded, settings=cold).ask("who?").text == likeliest
