"""OpenAI's Python client against a real server: what works, and what is refused how."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

NESTED = (
    b'{"model": "toy", "messages": [{"role": "user", "content": "a"}], "response_format": '
    b'{"type": "json_schema", "json_schema": {"name": "x", "schema": %s}}}'
)
"""A request whose schema is missing."""


def asks(*parts: Any, text: str = "What colour is the star?") -> list[Any]:
    images = [{"type": "image_url", "image_url": {"url": url}} for url in parts]
    return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]


def answer_of(client: openai.OpenAI, **options: Any) -> str:
    done = client.chat.completions.create(**{"model": "toy", **options})
    return done.choices[0].message.content


def test_models_are_the_adapters_and_the_base(server) -> None:
    client = server.client()
    assert [model.id for model in client.models.list()] == ["toy", "caption", "toy-base"]
    assert client.models.retrieve("caption").id == "caption"
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-4'; there are: toy"):
        client.models.retrieve("gpt-4")


def test_an_image_is_seen_and_the_model_field_chooses(server, red_star) -> None:
    client = server.client()
    assert answer_of(client, messages=asks(red_star)) == "the star is red."
    caption = answer_of(client, model="caption", messages=asks(red_star, text="Describe it."))
    assert "star" in caption
    text_alone = client.chat.completions.create(
        model="toy-base", messages=[{"role": "user", "content": "Hello"}], max_tokens=4
    )
    assert text_alone.choices[0].finish_reason in {"stop", "length"}
    assert text_alone.usage.completion_tokens <= 4


def test_a_second_turn_remembers_the_image(server, red_star) -> None:
    messages = asks(red_star)
    messages.append({"role": "assistant", "content": "the star is red."})
    messages.append({"role": "user", "content": "What colour is the star?"})
    assert "red" in answer_of(server.client(), messages=messages)


def test_a_stream_gives_the_same_text_and_usage(server, red_star) -> None:
    stream = server.client().chat.completions.create(
        model="toy", messages=asks(red_star), stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    parts = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert parts[0].delta.role == "assistant"
    assert "".join(part.delta.content or "" for part in parts) == "the star is red."
    assert parts[-1].finish_reason == "stop"
    assert chunks[-1].usage.completion_tokens > 0
    assert sum(bool(part.delta.content) for part in parts) > 1


def test_logprobs_are_of_the_tokens_that_make_the_text(server, red_star) -> None:
    done = server.client().chat.completions.create(
        model="toy", messages=asks(red_star), logprobs=True, top_logprobs=3
    )
    tokens = done.choices[0].logprobs.content
    assert all(token.logprob <= 0 and len(token.top_logprobs) == 3 for token in tokens)
    assert all(token.top_logprobs[0].token == token.token for token in tokens)
    written = b"".join(bytes(token.bytes) for token in tokens).decode()
    assert "star is red" in written.replace("  ", " ")


def test_a_seed_repeats_several_answers(server) -> None:
    def texts() -> list[str]:
        done = server.client().chat.completions.create(
            model="toy-base",
            messages=[{"role": "user", "content": "Hello"}],
            n=3,
            seed=7,
            temperature=2.0,
            top_p=0.9,
            max_tokens=8,
            extra_body={"top_k": 50, "min_p": 0.01},
        )
        assert [choice.index for choice in done.choices] == [0, 1, 2]
        return [choice.message.content for choice in done.choices]

    first = texts()
    assert first == texts()
    assert len(set(first)) > 1


def test_stop_texts_end_the_answer(server, red_star) -> None:
    done = server.client().chat.completions.create(
        model="toy", messages=asks(red_star), stop=["is"], max_completion_tokens=20
    )
    assert done.choices[0].message.content == "the star"
    assert done.choices[0].finish_reason == "stop"
    short = server.client().chat.completions.create(
        model="toy", messages=asks(red_star), max_tokens=2
    )
    assert short.choices[0].finish_reason == "length"


def test_a_schema_or_grammar_that_is_wrong_is_a_400_of_streams_too(server) -> None:
    client = server.client()
    wrong = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}
    for options in ({"response_format": wrong}, {"extra_body": {"grammar": "root ::= nowhere"}}):
        for stream in (False, True):
            # without the time and place at which the library logs it
            with pytest.raises(openai.BadRequestError, match=r"cannot be used: [A-Z]"):
                client.chat.completions.create(
                    model="toy", messages=asks(), stream=stream, **options
                )


def test_an_answer_follows_a_json_schema_or_a_grammar(server, red_star) -> None:
    client = server.client()
    schema = {"type": "object", "properties": {"color": {"enum": ["red", "blue"]}}}
    schema |= {"required": ["color"], "additionalProperties": False}
    wanted = {"type": "json_schema", "json_schema": {"name": "color", "schema": schema}}
    answer = answer_of(client, messages=asks(red_star), response_format=wanted, max_tokens=60)
    assert json.loads(answer)["color"] in {"red", "blue"}
    grammar = 'root ::= "red" | "blue"'
    body = {"grammar": grammar}
    assert answer_of(client, messages=asks(red_star), extra_body=body) in {"red", "blue"}
    never = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#"}}}
    endless = client.chat.completions.create(
        model="toy", messages=asks(red_star), response_format={"type": "json_object"}, max_tokens=9
    )
    assert endless.usage.completion_tokens <= 9
    for wrong in ({"extra_body": {"grammar": "root ::="}}, {"response_format": never}):
        with pytest.raises(openai.BadRequestError):
            answer_of(client, messages=asks(red_star), max_tokens=9, **wrong)


def test_a_text_goes_on(server) -> None:
    client = server.client()
    done = client.completions.create(model="toy-base", prompt="the star is", max_tokens=3)
    tokens = server.post("/tokenize", json={"model": "toy-base", "prompt": "the star is"}).json()
    assert tokens["count"] == len(tokens["tokens"]) == done.usage.prompt_tokens
    again = client.completions.create(
        model="toy-base", prompt=tokens["tokens"], max_tokens=3, logprobs=2
    )
    assert again.choices[0].text == done.choices[0].text
    assert len(again.choices[0].logprobs.tokens) == 3
    back = server.post("/detokenize", json={"model": "toy-base", "tokens": tokens["tokens"]})
    assert back.json()["prompt"].endswith("the star is")
    streamed = client.completions.create(
        model="toy-base", prompt="the star is", max_tokens=3, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in streamed) == done.choices[0].text


def test_responses_without_memory(server, red_star) -> None:
    client = server.client()
    asked = [
        {
            "role": "user",
            "content": [
                {"type": "input_image", "image_url": red_star},
                {"type": "input_text", "text": "What colour is the star?"},
            ],
        }
    ]
    whole = client.responses.create(model="toy", input=asked, store=False)
    assert whole.output_text == "the star is red."
    assert whole.status == "completed"
    with client.responses.stream(model="toy", input=asked) as stream:
        kinds = [event.type for event in stream]
        assert stream.get_final_response().output_text == whole.output_text
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="toy", input="Hello", previous_response_id="resp_1")
    assert caught.value.param == "previous_response_id"


@pytest.mark.parametrize(
    ("wrong", "status", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "x"}}]}, 400, "tools"),
        ({"frequency_penalty": 0.5}, 400, "frequency_penalty"),
        ({"temperature": -1}, 400, "temperature"),
        ({"n": 99}, 400, "n"),
        ({"top_logprobs": 2}, 400, None),
        ({"max_tokens": 10_000}, 400, "max_tokens"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages.0.role"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, None),
        ({"messages": asks("data:image/png;base64,AAAA")}, 400, "messages.0.content.0"),
        ({"messages": asks("data:image/png,AAAA")}, 400, "messages.0.content.0"),
        ({"messages": asks(*["data:image/png;base64,AAAA"] * 10_000)}, 400, None),
        ({"model": "gpt-4"}, 404, "model"),
        ({"extra_body": {"experts": ["ocr"]}}, 400, "experts"),
        ({"extra_body": {"min_q": 1}}, 400, "min_q"),
        ({"response_format": {"type": "xml"}}, 400, "response_format.type"),
        ({"stop": [""]}, 400, "stop"),
    ],
)
def test_what_is_wrong_is_named(server, wrong, status, param) -> None:
    asked = {"model": "toy", "messages": [{"role": "user", "content": "Hello"}], **wrong}
    with pytest.raises(openai.APIStatusError) as caught:
        server.client().chat.completions.create(**asked)
    assert caught.value.status_code == status
    assert set(caught.value.body) == {"message", "type", "param", "code"}
    assert str(caught.value.param).partition(".list")[0].startswith(str(param))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b"\xff\xfe",
        b'{"model": "toy", "messages": [{"role": "user", "content": "a"}], "temperature": NaN}',
        b'{"model": "toy", "messages": [{"role": "user", "content": "a"}], "temperature": 1e999}',
        b'{"model": "toy", "messages": [{"role": "user", "content": "\xff"}]}',
        b'{"model": "toy", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b"[" * 100_000,
        *(NESTED % (b'{"items": ' * deep + b"{}" + b"}" * deep) for deep in (300, 900, 950, 990)),
        json.dumps({"model": "toy", "messages": None}).encode(),
    ],
)
def test_a_malformed_body_is_a_400_in_openais_form(server, body) -> None:
    headers = {"Content-Type": "application/json"}
    refused = server.post("/v1/chat/completions", content=body, headers=headers)
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] != "invalid_json" or error["param"] is None


@pytest.mark.parametrize(
    ("path", "fields", "message", "param"),
    [
        ("chat/completions", {"temprature": 1}, "{}; did you mean 'temperature'?", "temprature"),
        ("chat/completions", {"streem": True}, "{}; did you mean 'stream'?", "streem"),
        ("chat/completions", {"tool_choice": "required"}, "{}", "tool_choice"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "contents": "x"}]},
            "{}; did you mean 'content'?",
            "messages.0.contents",
        ),
        (
            "completions",
            {"stream": True, "stream_options": {"include_usages": True}},
            "{}; did you mean 'include_usage'?",
            "stream_options.include_usages",
        ),
        (
            "responses",
            {"input": "x", "text": {"format": {"type": "json_schema", "shema": {}}}},
            "{}; did you mean 'schema'?",
            "text.format.shema",
        ),
        ("responses", {"inputs": "x"}, "{}; did you mean 'input'?", "inputs"),
        (
            "responses",
            {"input": [{"role": "user", "content": "x", "contnt": 1}]},
            "{}; did you mean 'content'?",
            "input.0.contnt",
        ),
        ("completions", {"prompt": "x", "query": 1}, "{}", "query"),
        ("completions", {"\ud800": 1}, "{}", "\ufffd" * 3),  # which no answer can hold
    ],
)
def test_a_field_that_is_not_known_is_named_with_the_one_that_was_meant(
    server, path, fields, message, param
) -> None:
    content = json.dumps({"model": "toy", **fields})
    headers = {"Content-Type": "application/json"}
    refused = server.post(f"/v1/{path}", content=content, headers=headers)
    assert refused.status_code == 400, refused.text
    error = refused.json()["error"]
    assert (error["code"], error["param"]) == ("unsupported_field", param)
    assert error["message"].endswith(message.format(" is not supported"))


def test_a_wrong_value_is_named_by_its_whole_field(server) -> None:
    asked = {"model": "toy", "prompt": "x", "stream": 3}
    assert server.post("/v1/completions", json=asked).json()["error"]["param"] == "stream"


def test_neutral_values_of_unsupported_fields_pass(server, red_star) -> None:
    neutral = {"tools": [], "user": "me", "frequency_penalty": 0, "logit_bias": {}, "store": False}
    assert answer_of(server.client(), messages=asks(red_star), **neutral) == "the star is red."


def test_unknown_routes_and_methods_have_the_same_form(server) -> None:
    missing = server.get("/chat/completions").json()["error"]
    assert missing["code"] == "not_found"
    assert missing["message"].startswith("there is no '/chat/completions'; the paths of OpenAI's")
    wrong = server.get("/v1/chat/completions")
    assert wrong.status_code == 405
    assert wrong.json()["error"]["code"] == "method_not_allowed"
