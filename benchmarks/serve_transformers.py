"""`llama-adapter serve` against `transformers serve`: the plain base, text alone, equal requests.

    pip install 'transformers[serving]' && python -m benchmarks.serve_transformers

Both servers run in processes of their own with one thread, over the same random Llama, and stream
32 answers of equal length at once. `transformers serve` is measured as it starts by default, and
with continuous batching, for which it gets the cache that it needs. The ratio is of tokens for each
second of processor time.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import torch
from transformers import AutoTokenizer

from benchmarks.measuring import add_options, describe, make_llama
from benchmarks.serve import NEW_TOKENS, ROWS, stream_all
from llama_adapter import LlamaAdapterConfig, LlamaAdapterForConditionalGeneration
from llama_adapter.miniature.bundled import DECODER, load_bundled
from llama_adapter.model.references import resolve_reference
from llama_adapter.processing.processor import LlamaAdapterProcessor

TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser, rounds=5)
    parser.set_defaults(threads=1, layers=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        base, adapter = make_models(Path(folder), options)
        ours = [sys.executable, "-m", "llama_adapter.cli", "serve", str(adapter), "--name", "own"]
        theirs = [str(Path(sys.executable).with_name("transformers")), "serve", str(base)]
        theirs += ["--device", "cpu", "--dtype", "float32"]
        # a cache of as many tokens as they need: by default it is a share of the machine's memory
        batching = ["--continuous-batching", "--cb-block-size", "32", "--cb-num-blocks", "256"]
        batching += ["--cb-max-batch-tokens", "512"]
        servers = {
            "llama-adapter": ([*ours, "--rows", str(ROWS)], "own-base"),
            "transformers": (theirs, str(base)),
            "transformers, continuous batching": ([*theirs, *batching], str(base)),
        }
        found = {
            name: measured(command, model, rounds=options.rounds)
            for name, (command, model) in servers.items()
        }
    best = max(f["tokens_per_cpu_second"] for name, f in found.items() if name != "llama-adapter")
    ratio = round(found["llama-adapter"]["tokens_per_cpu_second"] / best, 2)
    results = {"servers": found, "ratio_of_cpu_time": ratio, "at least": 1, "met": ratio >= 1}
    text = json.dumps(describe("serve_transformers", results, options=options), indent=2)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")


def make_models(folder: Path, options: argparse.Namespace) -> tuple[Path, Path]:
    """A random base with a tokenizer and a template, and an adapter of it, which nobody asks."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_reference(DECODER))
    tokenizer.chat_template = TEMPLATE
    options.vocabulary = len(tokenizer)
    base = make_llama(options)
    base.generation_config.eos_token_id = None
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    odd = [token for token, text in enumerate(texts) if not text or not text.isascii()]
    with torch.no_grad():  # `transformers serve` ends a stream whose bytes make no text
        base.lm_head.weight[odd] = 0
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    config = LlamaAdapterConfig.preset("v2-chat")
    model = LlamaAdapterForConditionalGeneration.from_base(str(folder / "base"), None, config)
    model.save_pretrained(folder / "adapter")
    processor: LlamaAdapterProcessor = load_bundled()[1]
    LlamaAdapterProcessor(None, processor.tokenizer, template="toy").save_pretrained(
        folder / "adapter"
    )
    return folder / "base", folder / "adapter"


def measured(command: Sequence[str], model: str, *, rounds: int) -> dict[str, Any]:
    """Tokens of a server by the second, of the clock and of its processor time."""
    texts = [f"{index} Where is the star? Tell me all about it." for index in range(ROWS)]
    rates: dict[str, list[float]] = {"tokens_per_second": [], "tokens_per_cpu_second": []}
    with running(command) as (url, pid):
        for turn in range(rounds + 1):
            begun, spent = time.perf_counter(), cpu_seconds(pid)
            # a first word of its own, so that no prompt begins as one of an earlier turn
            asked = [f"{turn} {text}" for text in texts]
            made = sum(stream_all(f"{url}/v1/chat/completions", model, asked, NEW_TOKENS))
            if turn:  # the first warms up
                rates["tokens_per_second"].append(made / (time.perf_counter() - begun))
                rates["tokens_per_cpu_second"].append(made / (cpu_seconds(pid) - spent))
    return {name: round(statistics.median(found), 1) for name, found in rates.items()} | {
        "tokens": made
    }


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def running(command: Sequence[str]) -> Iterator[tuple[str, int]]:
    """A server on a free port, once it answers."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [*command, "--port", str(port)],
            stderr=log,
            stdout=log,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        url = f"http://127.0.0.1:{port}"
        try:
            while not _answers(url):
                if process.poll() is not None:
                    log.seek(0)
                    raise RuntimeError(f"{' '.join(command)} has ended: {log.read()[-2000:]}")
                time.sleep(0.2)
            yield url, process.pid
        finally:
            process.terminate()
            process.wait()


def _answers(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/health", timeout=60).is_success
    except httpx2.HTTPError:
        return False


if __name__ == "__main__":
    main()
