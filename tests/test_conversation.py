from __future__ import annotations

import base64
from pathlib import Path

import pytest

from llama_adapter.conversation import Conversation, ImageRef, Message
from llama_adapter.errors import PromptError


def test_ask_holds_question_image_context_and_answer() -> None:
    talk = Conversation.ask("What is it?", images=["cat.png"], context="a cat", answer="A cat.")
    assert [m.role for m in talk.messages] == ["user", "assistant"]
    assert talk.images[0].source == Path("cat.png")
    assert talk.context == "a cat"
    assert not talk.awaits_answer


def test_turns_are_added_without_changing_what_was_there() -> None:
    first = Conversation.ask("One?")
    second = first.assistant("1").user("Two?")
    assert len(first.messages) == 1
    assert [m.text for m in second.messages] == ["One?", "1", "Two?"]
    assert second.awaits_answer


def test_reads_hugging_face_and_openai_messages() -> None:
    pixels = base64.b64encode(b"not really pixels").decode()
    talk = Conversation.from_messages(
        [
            {"role": "developer", "content": "Be brief."},
            {
                "role": "user",
                "content": [
                    {"type": "image", "path": "a.png"},
                    {"type": "text", "text": "Look."},
                    {"type": "text", "text": "What?"},
                ],
            },
            {"role": "assistant", "content": "A star."},
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{pixels}"}},
                    "And now?",
                ],
            },
        ]
    )
    assert talk.system == "Be brief."
    assert talk.turns[0].text == "Look.\nWhat?"
    assert [image.source for image in talk.images] == [Path("a.png"), b"not really pixels"]


def test_an_image_may_be_handed_in_apart() -> None:
    talk = Conversation.from_messages([{"role": "user", "content": [{"type": "image"}, "What?"]}])
    assert talk.images == (ImageRef(source=None),)


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "no user message"),
        ([{"role": "system", "content": "x"}], "no user message"),
        ([{"role": "user", "content": "  "}], "user message 1 is empty"),
        ([{"role": "assistant", "content": "x"}], "must be from 'user'"),
        ([{"role": "user", "content": "x"}] * 2, "must be from 'assistant'"),
        ([{"role": "tool", "content": "x"}], "got 'tool'"),
        ([{"role": "user", "content": 3}], "got int"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "got 'audio'"),
        ([{"role": "user", "content": [{"type": "image", "base64": "§"}]}], "base64"),
        ([{"role": "user", "content": [{"type": "image", "url": "https://x/y.png"}]}], "remote"),
    ],
)
def test_malformed_conversations_are_refused(messages: list[dict], complaint: str) -> None:
    with pytest.raises(PromptError, match=complaint):
        Conversation.from_messages(messages)


def test_images_belong_to_the_user() -> None:
    with pytest.raises(PromptError, match="only user messages"):
        Message("assistant", "here", images=(ImageRef.of("a.png"),))


@pytest.mark.parametrize("text", ["lone \ud800", "\udcff"])
def test_lone_surrogates_are_no_text(text: str) -> None:
    with pytest.raises(PromptError, match=r"is not valid Unicode: character . is the lone"):
        Conversation.ask(text)
    with pytest.raises(PromptError, match="context is not valid Unicode"):
        Conversation.ask("who?", context=text)
    assert Conversation.ask("\U0001f600 é").turns[0].text == "\U0001f600 é"
