"""vLLM's own API server as a process, and the answers of `llama-adapter chat`."""

from __future__ import annotations

import base64
import io
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from llama_adapter.chat import ChatSession
from llama_adapter.cli.models import load
from llama_adapter.generation import GenerationSettings
from openai import OpenAI
from PIL import Image

MAX_TOKENS = 16
START_SECONDS = 600
ENVIRONMENT = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the worker is in the process of its engine
    "VLLM_NO_USAGE_STATS": "1",
}


@dataclass(frozen=True)
class Question:
    text: str
    images: tuple[Image.Image, ...] = ()

    def content(self) -> str | list[dict[str, Any]]:
        """As a client of OpenAI's API sends it."""
        if not self.images:
            return self.text
        shown = [
            {"type": "image_url", "image_url": {"url": data_url(image)}} for image in self.images
        ]
        return [*shown, {"type": "text", "text": self.text}]


@dataclass(frozen=True)
class Answer:
    text: str
    prompt_tokens: int
    cached_tokens: int


def data_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def chat_answers(model: str, questions: Sequence[Question]) -> list[str]:
    """What `llama-adapter chat MODEL` answers."""
    adapted, processor = load(model, device="cpu")
    settings = GenerationSettings(max_new_tokens=MAX_TOKENS)
    return [
        ChatSession(adapted, processor, settings=settings).ask(q.text, images=q.images).text
        for q in questions
    ]


@dataclass(frozen=True)
class Server:
    url: str
    stop: tuple[str, ...] = ()

    def ask(self, question: Question) -> Answer:
        client = OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)
        with client:
            done = client.chat.completions.create(
                model="served",
                messages=[{"role": "user", "content": question.content()}],  # type: ignore[list-item, misc]
                temperature=0,
                max_tokens=MAX_TOKENS,
                stop=list(self.stop) or None,
            )
        usage = done.usage
        assert usage is not None
        details = usage.prompt_tokens_details
        return Answer(
            text=(done.choices[0].message.content or "").strip(),
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=(details.cached_tokens or 0) if details else 0,
        )


def command(directory: Path, *options: str, port: int) -> list[str]:
    return [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(directory), "--served-model-name", "served"),
        *("--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"),
        *("--max-model-len", "512", "--max-num-seqs", "16", "--block-size", "32"),
        *("--enable-prompt-tokens-details", *options),
    ]


@contextmanager
def served(directory: Path, *options: str, log: Path, stop: Sequence[str] = ()) -> Iterator[Server]:
    """vLLM's API server for an export, stopped at the end with what it started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as out:
        process = subprocess.Popen(
            command(directory, *options, port=port),
            env={**os.environ, **ENVIRONMENT},
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            _wait(process, url, log)
            yield Server(url, tuple(stop))
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(30)
            with suppress(ProcessLookupError):  # a server that hangs, and engines that it left
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"vLLM ended with {process.returncode}:\n{log.read_text()[-3000:]}")
        try:
            with urlopen(f"{url}/health", timeout=5):
                return
        except (URLError, OSError):
            time.sleep(0.5)
    raise RuntimeError(f"vLLM did not start in {START_SECONDS} s:\n{log.read_text()[-3000:]}")
