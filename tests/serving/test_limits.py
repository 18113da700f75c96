"""Many clients, hostile clients and clients that leave: the others notice nothing."""

from __future__ import annotations

import base64
import io
import json
import logging
import re
import shutil
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from PIL import Image
from tests.threads import becomes

from llama_adapter.errors import ConfigError
from llama_adapter.generation.engine import EngineSettings, RowEngine
from llama_adapter.miniature.bundled import bundled_adapter, load_bundled
from llama_adapter.serving.auth import Keys
from llama_adapter.serving.limits import Limits
from llama_adapter.serving.metrics import JsonLines
from llama_adapter.serving.service import Service

LONG = {"model": "toy-base", "prompt": "the star is", "max_tokens": 900}
"""An answer of 147 tokens, most of a minute where the model is `slow`."""
SHORT = {"model": "toy-base", "prompt": "the star is", "max_tokens": 1}
KEY, OTHER, ADMIN = "first-key-0123456789", "second-key-0123456789", "admin-key-0123456789"


def as_http(body: bytes, *, path: str = "/v1/completions", length: int | None = None) -> bytes:
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body) if length is None else length}\r\n\r\n"
    )
    return head.encode() + body


@contextmanager
def answering(running: Any, **options: Any) -> Any:
    """A stream that has begun and goes on for long."""
    with httpx2.stream(
        "POST",
        running.url + "/v1/completions",
        json={**LONG, "stream": True},
        timeout=60,
        **options,
    ) as response:
        assert response.status_code == 200
        lines = response.iter_lines()
        next(lines)
        yield lines


@pytest.mark.usefixtures("slow")
def test_a_full_server_says_so_before_it_reads_anything(serving: Any) -> None:
    with serving(limits=Limits(max_requests=1)) as running:
        with answering(running):
            garbage = {"content": b"x" * 100_000, "headers": {"Content-Type": "application/json"}}
            refused = running.post("/v1/completions", **garbage)
            assert refused.status_code == 429
            assert int(refused.headers["Retry-After"]) >= 1
            assert refused.json()["error"]["code"] == "queue_full"
            # whoever asks for something else may not fill the memory either
            assert running.post("/tokenize", **garbage).status_code == 429
            assert running.post("/elsewhere", **garbage).status_code == 429
            assert running.get("/health").status_code == 200
        assert running.is_idle()
        assert running.post("/v1/completions", json={**SHORT, "n": 2}).status_code == 429
        assert running.post("/v1/completions", json=SHORT).status_code == 200


def test_the_images_of_a_request_are_bounded_together(serving: Any) -> None:
    content = io.BytesIO()
    Image.new("RGB", (20, 20)).save(content, "PNG")
    image = "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()
    part = {"type": "image_url", "image_url": {"url": image}}
    with serving(limits=Limits(max_request_pixels=1000)) as running:
        for count, status in ((2, 200), (3, 400)):
            message = {
                "role": "user",
                "content": [part] * count + [{"type": "text", "text": "What is it?"}],
            }
            asked = {"model": "toy", "messages": [message], "max_tokens": 1}
            answer = running.post("/v1/chat/completions", json=asked)
            assert answer.status_code == status, answer.text
        error = answer.json()["error"]
        assert error["param"] == "messages.0.content.2"
        assert running.is_idle()


def test_nothing_is_read_where_nothing_is_taken(server: Any) -> None:
    with socket.create_connection(("127.0.0.1", server.port), 60) as client:
        client.sendall(as_http(b"", path="/health", length=1000))
        assert client.recv(100).startswith(b"HTTP/1.1 405")


@pytest.mark.parametrize(
    "body",
    [
        {"input": "hi", "text": {"format": {"type": "json_schema"}}},
        {"input": [{"role": "user", "content": "hi"}] * 10_000, "instructions": "be kind"},
    ],
)
def test_what_only_the_chat_form_of_a_response_refuses_is_a_400(server: Any, body: Any) -> None:
    answer = server.post("/v1/responses", json={"model": "toy", **body})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


def test_a_text_is_bounded_before_it_becomes_tokens(serving: Any) -> None:
    long, model = "a " * 1000, {"model": "toy"}
    with serving(limits=Limits(max_prompt_tokens=100)) as running:
        for path, name in (
            ("/tokenize", "prompt"),
            ("/tokenize", "messages"),
            ("/v1/completions", "prompt"),
            ("/v1/chat/completions", "messages"),
        ):
            for text, status in ((long, 400), ("a", 200)):
                parts = [{"type": "text", "text": text}]
                said = text if name == "prompt" else [{"role": "user", "content": parts}]
                answer = running.post(path, json={**model, name: said})
                assert answer.status_code == status, answer.text
                if status == 400:
                    assert answer.json()["error"]["param"] == name
                    assert "2000 letters" in answer.json()["error"]["message"]


def test_bodies_are_bounded_and_have_to_arrive(serving: Any) -> None:
    with serving(limits=Limits(max_body_bytes=10_000, body_seconds=3)) as running:
        long = {"content": b" " * 20_000, "headers": {"Content-Type": "application/json"}}
        assert running.post("/v1/completions", **long).status_code == 413
        long["content"] = iter([b" " * 5_000] * 4)  # chunked: nobody says how long it will be
        assert running.post("/v1/completions", **long).status_code == 413
        with running.connect() as slow:  # a byte now and then is not a body
            slow.sendall(as_http(b"{", length=100))
            for _ in range(3):
                time.sleep(0.1)
                slow.sendall(b" ")
            assert b" 408 " in slow.recv(4096)
        assert running.is_idle()
        assert running.post("/v1/completions", json=SHORT).status_code == 200
    with serving(limits=Limits(header_seconds=0.4)) as running:
        with running.connect() as slow:
            with suppress(ConnectionError):
                slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: local")
            assert slow.recv(4096) == b""  # closed
        with running.connect() as idle:
            assert idle.recv(4096) == b""


@contextmanager
def unread(running: Any, path: str, **asked: Any) -> Any:
    """A connection whose client asks and then reads nothing."""
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(60)
        client.connect(("127.0.0.1", running.port))
        client.sendall(as_http(json.dumps(asked).encode(), path=path))
        yield client


@pytest.mark.usefixtures("slow")
def test_a_stream_that_nobody_reads_is_ended(serving: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama_adapter.serving.gate._SEND_SECONDS", 0.5)
    wordy = {**LONG, "n": 4, "logprobs": 5, "stream": True}
    with (
        serving(send_buffer=4096) as running,
        unread(running, "/v1/completions", **wordy) as client,
    ):
        client.recv(1)  # it has begun
        assert running.is_idle(connections=0)
        with client.makefile("rb") as rest, suppress(ConnectionError):
            assert b"[DONE]" not in rest.read()
        errors = re.findall(r"errors_total\{.*", running.get("/metrics").text)
        assert errors == ['errors_total{code="client_stalled"} 1.0']


def test_an_answer_that_nobody_takes_is_dropped(
    serving: Any, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is taken slowly arrives, although it takes longer than headers may."""
    monkeypatch.setattr("llama_adapter.serving.server._SLOWEST_READER", 16)
    words = 8 * engine.context_length  # as many of one letter and a space as are taken
    asked = {"model": "toy", "prompt": "a " * words}
    with (
        serving(limits=Limits(header_seconds=2), send_buffer=4096) as running,
        unread(running, "/tokenize", **asked) as client,
    ):
        client.recv(1)
        assert running.is_idle(connections=0)
        assert len(client.makefile("rb").read()) < 20_000
    with serving(limits=Limits(header_seconds=3), send_buffer=4096) as running:
        with unread(running, "/tokenize", **asked) as client:
            found, begun = b"", time.monotonic()
            while not found.endswith(b"]}"):
                taken = client.recv(1 << 10)
                assert taken, found[:1000]
                found += taken
                time.sleep(0.2 if time.monotonic() < begun + 5 else 0)
            assert time.monotonic() > begun + 3
        assert json.loads(found.partition(b"\r\n\r\n")[2])["count"] >= words


def test_sixty_megabytes_are_refused_before_they_are_read(server: Any) -> None:
    with server.connect() as huge:
        huge.sendall(as_http(b" " * 100_000, path="/v1/chat/completions", length=60_000_000))
        assert b" 413 " in huge.recv(4096)


@pytest.mark.usefixtures("slow")
def test_whoever_leaves_frees_the_row(server: Any) -> None:
    with answering(server):
        pass
    assert server.is_idle()
    with pytest.raises(httpx2.TimeoutException):
        httpx2.post(server.url + "/v1/completions", json=LONG, timeout=0.5)
    assert server.is_idle()
    with server.connect() as half_closed:
        half_closed.sendall(as_http(json.dumps(LONG).encode()))
        assert becomes(lambda: server.gate.admission.count)  # it is being answered
        half_closed.shutdown(1)
        assert server.is_idle()
        assert half_closed.recv(100) == b""  # not because it was answered
    with server.connect() as incomplete:
        incomplete.sendall(as_http(b'{"model": ', length=5_000))
    assert server.is_idle()


@pytest.mark.usefixtures("slow")
def test_time_is_bounded(serving: Any) -> None:
    with serving(limits=Limits(request_seconds=0.4)) as running:
        late = running.post("/v1/completions", json=LONG)
        assert late.status_code == 504
        assert late.json()["error"]["code"] == "deadline_exceeded"
        with pytest.raises(openai.APIError, match="time limit"):
            list(running.client().completions.create(**LONG, stream=True))
        assert running.is_idle()


def test_answers_that_draining_cuts_off_say_so(serving: Any, slowed: Any) -> None:
    model, processor = load_bundled()
    ending = RowEngine(model, processor, name="toy", settings=EngineSettings(rows=2))
    with slowed(model), serving(engine=ending) as running, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(running.post, "/v1/completions", json=LONG)
        with answering(running) as lines:
            assert becomes(lambda: ending.stats.busy_rows == 2)
            ending.drain(0)
            *_, last, done = filter(None, lines)
        whole = asked.result()
    assert whole.status_code == 503
    assert int(whole.headers["Retry-After"]) >= 1
    assert done == "data: [DONE]"
    for body in (whole.json(), json.loads(last.removeprefix("data: "))):
        assert body["error"]["message"] == "the server is shutting down"
        assert body["error"]["code"] == "unavailable"


def test_what_bounds_max_tokens_is_named(serving: Any, engine: Any) -> None:
    for most, words, code in (
        (10, "answers of this server have at most 10 tokens", "invalid_value"),
        (engine.context_length, "after a prompt of ", "context_length_exceeded"),
    ):
        with serving(limits=Limits(max_tokens=most)) as running:
            asked = {**SHORT, "max_tokens": engine.context_length}
            refused = running.post("/v1/completions", json=asked).json()["error"]
            assert words in refused["message"]
            assert (refused["code"], refused["param"]) == (code, "max_tokens")


def test_keys_open_everything_but_health_and_the_page(serving: Any, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"# of two users\n{KEY}\n\n{OTHER}\n")
    with serving(keys=Keys.read(tmp_path / "keys")) as running:
        for path in ("/", "/health", "/ready"):
            assert running.get(path).status_code == 200
        for path in ("/v1/models", "/metrics", "/openapi.json"):
            refused = running.get(path)
            assert refused.status_code == 401
            assert refused.json()["error"]["code"] == "invalid_api_key"
        for key in (KEY, OTHER):
            assert list(running.client(key).models.list())
        with pytest.raises(openai.AuthenticationError):
            running.client(KEY + "x").completions.create(**SHORT)
        assert running.post("/v1/completions", content=b"x" * 100).status_code == 401


def test_short_missing_and_unsendable_keys_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# nothing\n")
    with pytest.raises(ConfigError, match="holds no key"):
        Keys.read(path)
    path.write_text("secret\n")
    with pytest.raises(ConfigError, match="key 1 has fewer than 16") as caught:
        Keys.read(path)
    assert "secret" not in str(caught.value)
    path.write_text("a key that no header could bring: \u00e9t\u00e9\n")
    with pytest.raises(ConfigError, match="key 1 has characters beyond ASCII"):
        Keys.read(path)


def test_adapters_come_and_go_with_an_admin_key(serving: Any, red_star: str) -> None:
    folder = bundled_adapter("v2").parent
    with serving(admin_keys=Keys((ADMIN,)), service={"adapter_folder": folder}) as running:
        asked = {"name": "again", "directory": "v2"}
        assert running.post("/v1/adapters", json=asked).status_code == 403
        headers = {"Authorization": f"Bearer {ADMIN}"}
        for wrong in ("../bases", "/etc", "none", "v2\0"):
            refused = running.post(
                "/v1/adapters", json={"name": "x", "directory": wrong}, headers=headers
            )
            assert refused.status_code == 400
        loaded = running.post("/v1/adapters", json=asked, headers=headers)
        assert loaded.status_code == 201, loaded.text
        assert running.post("/v1/adapters", json=asked, headers=headers).status_code == 400
        question = [
            {"type": "image_url", "image_url": {"url": red_star}},
            {"type": "text", "text": "What colour is the star?"},
        ]
        answer = running.client().chat.completions.create(
            model="again", messages=[{"role": "user", "content": question}]
        )
        assert answer.choices[0].message.content == "the star is red."
        gone = httpx2.delete(running.url + "/v1/adapters/again", headers=headers, timeout=60)
        assert gone.json() == {"id": "again", "deleted": True}
        assert running.get("/v1/models/again").status_code == 404


def test_an_option_that_adapters_lack_is_named(serving: Any, server: Any) -> None:
    headers = {"Authorization": f"Bearer {ADMIN}"}
    asked = {"name": "again", "directory": "v2"}
    refused = server.post("/v1/adapters", json=asked, headers=headers)
    assert refused.status_code == 403
    assert "--admin-keys" in refused.json()["error"]["message"]
    with serving(admin_keys=Keys((ADMIN,))) as running:
        refused = running.post("/v1/adapters", json=asked, headers=headers)
        assert refused.status_code == 400
        assert "--adapter-folder" in refused.json()["error"]["message"]


def test_an_adapter_that_does_not_fit_is_refused_while_others_answer(
    serving: Any, slowed: Any, adapter_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(bundled_adapter("v2"), tmp_path / "same")
    shutil.copytree(adapter_dir, tmp_path / "other-base")
    model, processor = load_bundled()
    full = RowEngine(model, processor, name="toy", settings=EngineSettings(rows=2, adapters=1))
    options = {"admin_keys": Keys((ADMIN,)), "service": {"adapter_folder": tmp_path}}
    with slowed(model), serving(engine=full, **options) as running, answering(running) as lines:
        for name, words in {"same": "holds 1 adapters", "other-base": "base"}.items():
            refused = running.post(
                "/v1/adapters",
                json={"name": name, "directory": name},
                headers={"Authorization": f"Bearer {ADMIN}"},
            )
            assert refused.status_code == 400, refused.text
            assert words in refused.json()["error"]["message"]
        assert next(lines) is not None
        assert running.get("/v1/models").json()["data"][0]["id"] == "toy"
    full.drain(0)


def test_pages_of_other_sites_are_kept_out(serving: Any, server: Any) -> None:
    foreign = {"Origin": "https://evil.example"}
    assert server.get("/v1/models", headers=foreign).status_code == 403
    assert server.get("/v1/models", headers={"Origin": server.url}).status_code == 200
    # a name of theirs that leads to this machine
    assert server.get("/v1/models", headers={"Host": "evil.example"}).status_code == 403
    assert server.get("/v1/models", headers={"Host": "127.example"}).status_code == 403
    assert server.get("/v1/models", headers={"Host": "127.0.0.2:80"}).status_code == 200
    preflight = {**foreign, "Access-Control-Request-Method": "POST"}
    refused = httpx2.options(server.url + "/v1/chat/completions", headers=preflight, timeout=60)
    assert "access-control-allow-origin" not in refused.headers
    with serving(origins=("https://good.example",)) as running:
        allowed = running.get("/v1/models", headers={"Origin": "https://good.example"})
        assert allowed.headers["access-control-allow-origin"] == "https://good.example"
        assert running.get("/v1/models", headers=foreign).status_code == 403
        # a proxy on this machine that keeps the name, and one that does not
        for host in ("good.example", "127.0.0.1"):
            headers = {"Host": host, "Origin": "https://good.example"}
            assert running.get("/v1/models", headers=headers).status_code == 200
        refused = running.get("/v1/models", headers={"Host": "evil.example"})
        assert refused.status_code == 403
        assert "--cors-origin" in refused.json()["error"]["message"]


def test_metrics_and_logs_count_and_quote_nothing(
    server: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="llama_adapter.serving")
    asked = {"model": "toy", "messages": [{"role": "user", "content": "Tell me of zebras"}]}
    answered = server.post("/v1/chat/completions", json=asked)
    server.post("/v1/chat/completions", json={**asked, "zebra": 1})
    assert becomes(lambda: len(caplog.records) >= 2)
    lines = [JsonLines().format(record) for record in caplog.records]
    assert not any("zebra" in line for line in lines)
    logged = [json.loads(line) for line in lines if '"request"' in line]
    [first] = [x for x in logged if x["request_id"] == answered.headers["X-Request-Id"]]
    assert first["prompt_tokens"] > 0
    assert first["status"] == 200
    assert any(line.get("error") == "unsupported_field" for line in logged)
    text = server.get("/metrics").text
    for name in ("requests_total", "first_token_seconds_bucket", "queued", "rows", "errors_total"):
        assert f"llama_adapter_{name}" in text
    assert "zebra" not in text


def test_the_page_may_run_its_own_script_alone(server: Any) -> None:
    page = server.get("/")
    policy = page.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http:" not in page.text.replace("http://www.w3.org", "")
    assert "https:" not in page.text


def test_no_adapter_may_be_named_as_the_base_is(engine: Any) -> None:
    with pytest.raises(ConfigError, match="an adapter is named 'toy', as the base"):
        Service(engine=engine, base_name="toy")


def test_a_text_far_beyond_the_context_is_refused_before_it_is_made_into_tokens(
    server: Any, engine: Any
) -> None:
    long = "a " * (16 * engine.context_length)
    for asked in ({"prompt": long}, {"messages": [{"role": "user", "content": long}]}):
        answer = server.post("/tokenize", json={"model": "toy", **asked})
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "context_length_exceeded"
