"""Thousands of mixed, cancelled and malformed requests against one server process.

    python -m benchmarks.soak                         # 10,000 requests, about half an hour
    python -m benchmarks.soak --requests 300

Every greedy answer is compared with the one that the same request got alone, and these with what
`generate` writes. The report counts wrong answers, rows that stay busy, 5xx that nothing provoked,
and how much the server's resident memory grows over the last three quarters.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import httpx2
from PIL import Image

from benchmarks.measuring import describe, status_bytes
from llama_adapter.conversation import Conversation
from llama_adapter.generation.answer import answer
from llama_adapter.generation.settings import GenerationSettings
from llama_adapter.miniature.bundled import bundled_adapter, load_bundled
from llama_adapter.miniature.rendering import render
from llama_adapter.miniature.scenes import Split, scene_stream

QUESTIONS = (
    "What color is the circle?",
    "How many objects are there?",
    "Describe the picture.",
    "Where is the square? Tell me more about it, and about everything next to it.",
)
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["star", "square"]}, "big": {"type": "boolean"}},
    "required": ["kind", "big"],
    "additionalProperties": False,
}
ADAPTERS = {"toy": "v2", "caption": "caption"}
ADMIN = "admin-key-of-the-soak"
CHAT = "/v1/chat/completions"
PATIENCE = 3600
"""Seconds for one request: a busy machine is not a fault of the server's."""
GREEDY = 64
"""Different greedy requests."""
SHARES = {
    "greedy": 64.0,
    "sampled": 8.0,
    "leaves": 13.0,
    "malformed": 9.0,
    "too_large": 3.0,
    "broken_off": 2.8,
    "adapters": 0.2,
}
"""Of a hundred requests."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="also write the JSON there")
    parser.set_defaults(device="cpu")
    options = parser.parse_args()
    results = soak(options.requests, clients=options.clients, seed=options.seed)
    text = json.dumps(describe("soak", results, options=options), indent=2)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")
    sys.exit(not results["met"])


def soak(requests: int, *, clients: int = 24, seed: int = 0) -> dict[str, Any]:
    """The report of one run."""
    with tempfile.TemporaryFile() as log:
        command = [sys.executable, "-m", "llama_adapter.cli", "serve", "toy", "--port", "0"]
        command += ["--request-seconds", str(PATIENCE)]
        command += ["--adapter", f"caption={bundled_adapter('caption')}", "--max-body-mib", "1"]
        with tempfile.NamedTemporaryFile("w") as keys:
            keys.write(ADMIN)
            keys.flush()
            folder = str(bundled_adapter("v2").parent)
            command += ["--admin-keys", keys.name, "--adapter-folder", folder]
            process = subprocess.Popen(command, stderr=log)
            try:
                url = _url(process, log)
                results = asyncio.run(_Soak(url, process.pid, requests, seed).run(clients))
                process.send_signal(signal.SIGTERM)
                results["exit_status"] = process.wait(120)
            finally:
                process.kill()
                process.wait()
        log.seek(0)
        results["failures_in_the_log"] = sum(b'"event": "failed"' in line for line in log)
    results["met"] = results["rss_growth"] < 0.02 and not any(
        results[name]
        for name in ("wrong", "unexpected", "stuck", "exit_status", "failures_in_the_log")
    )
    return results


def _url(process: subprocess.Popen[bytes], log: Any) -> str:
    while process.poll() is None:
        log.seek(0)
        for line in log:
            if b'"event": "serving"' in line:
                return str(json.loads(line)["url"])
        time.sleep(0.1)
    raise RuntimeError("the server has not started")


@dataclass(frozen=True, eq=False)
class Case:
    """A request that always gets the same answer."""

    path: str
    body: dict[str, Any]
    conversation: Conversation | None = None
    """What `generate` is asked to compare with; None where it cannot be."""


def cases(rng: random.Random) -> list[Case]:
    """Greedy requests of all kinds: adapters, images, turns, lengths, stops, logprobs, schemas."""
    scenes = islice(scene_stream(3, split=Split.TRAIN), 6)
    images = [render(scene, random.Random(i)) for i, scene in enumerate(scenes)]
    found = []
    for index in range(GREEDY):
        model = ("toy", "caption", "toy", "toy-base")[index % 4]
        question = QUESTIONS[rng.randrange(len(QUESTIONS))]
        image = None if model == "toy-base" or index % 5 == 4 else rng.choice(images)
        tokens = rng.choice((1, 4, 12, 24, 48))
        body: dict[str, Any] = {"model": model, "max_tokens": tokens}
        if index % 16 == 7:
            found.append(Case("/v1/completions", body | {"prompt": question, "logprobs": 2}))
            continue
        parts: list[Any] = [{"type": "text", "text": question}]
        if image is not None:
            parts.append({"type": "image_url", "image_url": {"url": _data_url(image)}})
        body["messages"] = [{"role": "user", "content": parts}]
        if index % 16 == 11:
            found.append(Case("/v1/responses", _as_response(body)))
            continue
        if index % 8 == 5:
            turns = [{"role": "assistant", "content": "it is red."}]
            body["messages"] += [*turns, {"role": "user", "content": "And the square?"}]
        elif index % 8 == 3:
            body |= {"stop": ["is"], "logprobs": True, "top_logprobs": 3}
        elif index % 8 == 6:
            body["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "found", "schema": SCHEMA},
            }
        else:
            asked = Conversation.ask(question, images=[] if image is None else [image])
            found.append(Case(CHAT, body, asked))
            continue
        found.append(Case(CHAT, body))
    return found


def _as_response(body: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": body["model"],
        "input": body["messages"],
        "max_output_tokens": body["max_tokens"],
    }


def _data_url(image: Image.Image) -> str:
    content = io.BytesIO()
    image.save(content, "PNG")
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()


def generated(asked: list[Case]) -> list[str | None]:
    """What `generate` answers to each, None where it cannot be asked."""
    models = {name: load_bundled(directory) for name, directory in ADAPTERS.items()}
    found: list[str | None] = []
    for case in asked:
        if case.conversation is None:
            found.append(None)
            continue
        model, processor = models.get(case.body["model"]) or models["toy"]
        settings = GenerationSettings(max_new_tokens=case.body["max_tokens"])
        if case.body["model"] == "toy-base":
            with model.adapters_disabled():
                [given] = answer(model, processor, [case.conversation], settings)
        else:
            [given] = answer(model, processor, [case.conversation], settings)
        found.append(given.text)
    return found


MALFORMED: list[tuple[str, bytes | dict[str, Any]]] = [
    (CHAT, b""),
    (CHAT, b"{"),
    (CHAT, b"\xff\xfe\x00"),
    (CHAT, b"[" * 50_000),
    (CHAT, b'{"model": "toy", "messages": [{"role": "user", "content": "\\ud800"}]}'),
    (CHAT, b'{"model": "toy", "messages": [], "temperature": NaN}'),
    (CHAT, {"model": "toy", "messages": [{"role": "user", "content": 7}]}),
    (CHAT, {"model": "none", "messages": [{"role": "user", "content": "Hello"}]}),
    (CHAT, {"model": "toy", "messages": [{"role": "user", "content": "Hello " * 5_000}]}),
    (CHAT, {"model": "toy", "messages": [{"role": "user", "content": "Hi"}], "tools": [{}]}),
    (CHAT, {"model": "toy", "messages": [{"role": "user", "content": "Hi"}], "grammar": "root"}),
    (CHAT, {"model": "toy", "messages": [{"role": "user", "content": "Hi"}], "n": 100}),
    ("/v1/completions", {"model": "toy", "prompt": [10**9]}),
    ("/v1/completions", {"model": "toy", "prompt": "x", "max_tokens": 10**9}),
    ("/v1/responses", {"model": "toy", "input": "x", "previous_response_id": "resp_1"}),
    ("/v1/nothing", {}),
] + [
    (CHAT, {"model": "toy", "messages": [{"role": "user", "content": [part] * count}]})
    for count, part in (
        (1, {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}),
        (1, {"type": "image_url", "image_url": {"url": "http://127.0.0.1/a.png"}}),
        (5_000, {"type": "image_url", "image_url": {"url": "data:,"}}),
    )
]


@dataclass
class _Soak:
    url: str
    pid: int
    requests: int
    seed: int
    statuses: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    wrong: list[Any] = field(default_factory=list)
    unexpected: list[Any] = field(default_factory=list)
    """5xx, and answers that are not what the request should get."""
    memory: list[int] = field(default_factory=list)
    """Resident bytes, a hundred samples."""

    async def run(self, clients: int) -> dict[str, Any]:
        self.rng = random.Random(self.seed)
        self.cases = cases(self.rng)
        async with httpx2.AsyncClient(base_url=self.url, timeout=PATIENCE) as self.http:
            while (await self.http.get("/ready")).status_code != 200:
                await asyncio.sleep(0.1)
            self.alone = [await self.answer(case) for case in self.cases]
            by_generate = await asyncio.to_thread(generated, self.cases)
            for case, given, wanted in zip(self.cases, self.alone, by_generate, strict=True):
                if wanted is not None and given != wanted:
                    self.wrong.append([case.body["model"], given, wanted])
            start = time.monotonic()
            self.left = iter(range(self.requests))
            await asyncio.gather(*(self.client() for _ in range(clients)))
            seconds = time.monotonic() - start
            stuck = await self.stuck()
        quarter = self.memory[len(self.memory) // 4 :]
        few = max(1, len(quarter) // 10)
        first, last = statistics.median(quarter[:few]), statistics.median(quarter[-few:])
        return {
            "requests": self.requests,
            "seconds": round(seconds, 1),
            "kinds": dict(self.kinds),
            "statuses": dict(self.statuses),
            "greedy_answers_of_generate": sum(text is not None for text in by_generate),
            "wrong": self.wrong[:20],
            "unexpected": self.unexpected[:20],
            "stuck": stuck,
            "rss_mib": [round(size / 2**20, 1) for size in self.memory],
            "rss_growth": round(last / first - 1, 4),
        }

    async def client(self) -> None:
        every = max(1, self.requests // 100)
        for index in self.left:
            if index % every == 0:
                self.memory.append(status_bytes("VmRSS", self.pid))
                if index % (every * 10) == 0:
                    found = f"{len(self.wrong)} wrong, {len(self.unexpected)} unexpected"
                    print(f"{index}: {self.memory[-1] >> 20} MiB, {found}", file=sys.stderr)
            # what is asked does not hang on which client comes to it first
            rng = random.Random(f"{self.seed} {index}")
            [kind] = rng.choices(list(SHARES), list(SHARES.values()))
            self.kinds[kind] += 1
            try:
                await getattr(self, kind)(rng)
            except Exception as error:
                self.unexpected.append([kind, f"{type(error).__name__}: {error}"[:300]])

    # --- kinds of requests --------------------------------------------------------------------

    async def greedy(self, rng: random.Random) -> None:
        """What has one right answer, at once or as a stream."""
        index = rng.randrange(len(self.cases))
        case, stream = self.cases[index], rng.random() < 0.5
        given = await self.answer(case, stream=stream)
        if given != self.alone[index]:
            self.wrong.append([index, case.body["model"], stream, given, self.alone[index]])

    async def sampled(self, rng: random.Random) -> None:
        """Several answers, drawn."""
        body = {**self.cases[rng.randrange(0, GREEDY, 4)].body, "max_tokens": 12}
        n = body["n"] = rng.randint(1, 4)
        body |= {"temperature": 1.5, "top_p": 0.9, "seed": rng.randrange(100)}
        done = await self.post(CHAT, body)
        if not done.is_success or len(done.json()["choices"]) != n:
            self.unexpected.append(["sampled", done.status_code, done.text[:300]])

    async def leaves(self, rng: random.Random) -> None:
        """A long answer, whose client does not wait for its end."""
        model = rng.choice(("toy", "toy-base"))
        body = {"model": model, "prompt": "the", "max_tokens": 200, "temperature": 5.0}
        body["stream"] = stream = rng.random() < 0.5
        if not stream:
            try:
                async with asyncio.timeout(rng.random()):
                    await self.post("/v1/completions", body)
            except TimeoutError:
                return
        async with self.http.stream("POST", "/v1/completions", json=body) as response:
            self.statuses[str(response.status_code)] += 1
            lines = response.aiter_lines()
            for _ in range(rng.randrange(8)):
                await anext(lines, None)

    async def malformed(self, rng: random.Random) -> None:
        """A 4xx in OpenAI's form."""
        path, body = rng.choice(MALFORMED)
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        done = await self.post(path, content)
        if not 400 <= done.status_code < 500 or "message" not in done.json()["error"]:
            self.unexpected.append([path, str(body)[:80], done.status_code, done.text[:300]])

    async def too_large(self, rng: random.Random) -> None:
        """More bytes than may be, announced or not."""

        async def pieces() -> AsyncIterator[bytes]:
            for _ in range(24):
                yield b" " * 65_536

        content = pieces() if rng.random() < 0.5 else b" " * 1_500_000
        try:
            done = await self.post(CHAT, content)
        except httpx2.WriteError:
            return  # refused while it was still being sent
        if done.status_code != 413:
            self.unexpected.append(["too large", done.status_code, done.text[:300]])

    async def broken_off(self, rng: random.Random) -> None:
        """Connections that end early, half closed, or do not speak HTTP."""
        body = json.dumps({"model": "toy-base", "prompt": "the", "max_tokens": 100}).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n"
        whole = head % len(body) + b"Content-Type: application/json\r\n\r\n" + body
        sent = rng.choice((whole[: rng.randrange(len(whole))], whole, rng.randbytes(200)))
        address = httpx2.URL(self.url)
        reader, writer = await asyncio.open_connection(address.host, address.port)
        writer.write(sent)
        if rng.random() < 0.5:
            writer.write_eof()
            await reader.read()
        writer.close()

    async def adapters(self, rng: random.Random) -> None:
        """An adapter comes, answers and goes."""
        name = f"more-{rng.randrange(10**9)}"
        headers = {"Authorization": f"Bearer {ADMIN}"}
        asked = {"name": name, "directory": "v2"}
        done = await self.http.post("/v1/adapters", json=asked, headers=headers)
        if done.status_code != 201:
            self.unexpected.append(["load", done.status_code, done.text[:300]])
            return
        index = rng.randrange(0, GREEDY, 4)  # of `toy`, which is the same adapter
        case = self.cases[index]
        given = await self.answer(Case(case.path, {**case.body, "model": name}))
        if given != self.alone[index]:
            self.wrong.append([index, name, given, self.alone[index]])
        done = await self.http.delete(f"/v1/adapters/{name}", headers=headers)
        if not done.is_success:
            self.unexpected.append(["unload", done.status_code, done.text[:300]])

    # --- the ways to the server ---------------------------------------------------------------

    async def post(self, path: str, body: Any) -> httpx2.Response:
        """The answer; one for which there was no place is asked for again."""
        given = {"json": body} if isinstance(body, dict) else {"content": body}
        headers = {"Content-Type": "application/json"}
        while True:
            done = await self.http.post(path, headers=headers, **given)
            self.count(done.status_code)
            if done.status_code != 429:
                return done
            await asyncio.sleep(1)

    def count(self, status: int) -> None:
        self.statuses[str(status)] += 1
        if status >= 500:
            self.unexpected.append(["5xx", status])

    async def answer(self, case: Case, *, stream: bool = False) -> str:
        """The text of an answer."""
        if not stream:
            done = await self.post(case.path, case.body)
            if not done.is_success:
                raise RuntimeError(f"{done.status_code}: {done.text[:300]}")
            return _text(done.json())
        while True:
            body = {**case.body, "stream": True}
            async with self.http.stream("POST", case.path, json=body) as response:
                self.count(response.status_code)
                if response.status_code == 200:
                    found = [json.loads(line[6:]) async for line in _events(response)]
                    return "".join(map(_added, found))
            await asyncio.sleep(1)

    async def stuck(self) -> dict[str, float]:
        """What is still busy half a minute after the last request."""
        busy: dict[str, float] = {}
        for _ in range(300):
            lines = (await self.http.get("/metrics")).text.splitlines()
            found = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
            names = ("under_way", "queued", "busy_rows")
            busy = {name: float(found[f"llama_adapter_{name}"]) for name in names}
            busy = {name: count for name, count in busy.items() if count}
            if not busy:
                break
            await asyncio.sleep(0.1)
        return busy


async def _events(response: httpx2.Response) -> AsyncIterator[str]:
    async for line in response.aiter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield line


def _text(done: dict[str, Any]) -> str:
    if done["object"] == "response":
        return str(done["output"][0]["content"][0]["text"])
    choice = done["choices"][0]
    return str(choice["text"] if "text" in choice else choice["message"]["content"])


def _added(event: dict[str, Any]) -> str:
    if event.get("error"):
        raise RuntimeError(str(event["error"]))
    if "choices" not in event:
        return str(event.get("delta", ""))
    choice = event["choices"][0]
    return str(choice["text"] if "text" in choice else choice["delta"].get("content", ""))


if __name__ == "__main__":
    main()
