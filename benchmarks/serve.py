"""What the row engine gains and costs: ratios of processor time, all sides in one process.

    python -m benchmarks.serve                        # on the CPU, one thread
    python -m benchmarks.serve --only batching stack

batching   32 requests with images at once against one by one, on the miniature model
stack      a decode step of 32 rows: one prepared adapter and 100 mixed, against the base
first      time to the first token of an image, against 576 image tokens before the prompt
http       32 streams of a server at once, against the same requests to the engine itself
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import islice
from multiprocessing import get_context
from typing import Any, ClassVar

import httpx2
import torch
from torch import nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from benchmarks.measuring import add_options, describe, interleaved, make_llama
from llama_adapter import LlamaAdapterConfig, LlamaAdapterForConditionalGeneration
from llama_adapter.conversation import Conversation
from llama_adapter.generation.answer import answer
from llama_adapter.generation.engine import EngineSettings, RowEngine
from llama_adapter.generation.passes import Chunk, RowModel
from llama_adapter.generation.requests import GenerationRequest, Sampling, encode_prompt
from llama_adapter.generation.settings import GenerationSettings
from llama_adapter.miniature.bundled import load_bundled
from llama_adapter.miniature.rendering import render
from llama_adapter.miniature.scenes import Split, scene_stream
from llama_adapter.model.adapter import Adapter
from llama_adapter.model.stack import AdapterStack, RowReads
from llama_adapter.processing.processor import LlamaAdapterProcessor
from llama_adapter.serving.app import make_app
from llama_adapter.serving.limits import Limits
from llama_adapter.serving.server import Server, bind
from llama_adapter.serving.service import Service

ROWS, CONTEXT, NEW_TOKENS, IMAGE_TOKENS = 32, 64, 48, 576


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser, rounds=40)
    parser.add_argument("--only", nargs="*", default=["batching", "stack", "first", "http"])
    parser.add_argument("--turns", type=int, default=1, help="of all 32 requests, for `batching`")
    parser.set_defaults(threads=1, layers=4)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results: dict[str, Any] = {}
    if "batching" in options.only:
        results["batching at 32 tokens"] = _at_least(7, batching(words=0, turns=options.turns))
        results["batching at 256 tokens"] = _at_least(4, batching(words=216, turns=options.turns))
    if "stack" in options.only:
        merged, mixed = stacked_steps(options)
        results["base over prepared adapter"] = _at_least(0.95, merged)
        results["100 adapters over one prepared"] = _at_most(1.12, mixed)
    if "first" in options.only:
        results["first token against 576 image tokens"] = _at_least(5, first_token(options))
    if "http" in options.only:
        results["http over engine alone"] = _at_most(1.05, http(options))
    text = json.dumps(describe("serve", results, options=options), indent=2, default=str)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")


def _at_least(target: float, result: dict[str, Any]) -> dict[str, Any]:
    return {**result, "at least": target, "met": result["ratio_of_cpu_time"] >= target}


def _at_most(target: float, result: dict[str, Any]) -> dict[str, Any]:
    return {**result, "at most": target, "met": result["ratio_of_cpu_time"] <= target}


# --- 32 requests at once -------------------------------------------------------------------------


def batching(*, words: int, turns: int) -> dict[str, Any]:
    """Processor time of answering one by one over that of the engine, the same answers."""
    scenes = islice(scene_stream(1, split=Split.TRAIN), ROWS)
    images = [render(scene, random.Random(i)) for i, scene in enumerate(scenes)]
    model, processor = load_bundled("v2")
    question = "Describe the picture." + " It is big." * (words // 4)
    conversations = [Conversation.ask(question, images=[image]) for image in images]
    alone = load_bundled("v2")[0]
    alone.prepare_for_inference()
    alone.generation_config.eos_token_id = None
    engine = _endless_engine(model, processor)
    together = partial(_together, engine, conversations)

    def one_by_one() -> list[str]:
        settings = GenerationSettings(max_new_tokens=NEW_TOKENS)
        return [answer(alone, processor, [c], settings)[0].text for c in conversations]

    seconds: dict[str, list[float]] = {"engine": [], "one by one": []}
    found: dict[str, list[str]] = {}
    for _ in range(turns):
        _forget_prefixes(engine)
        for name, run in (("engine", together), ("one by one", one_by_one)):
            start = time.process_time()
            found[name] = run()
            seconds[name].append(time.process_time() - start)
    engine.drain(10)
    prompt = encode_prompt(processor, conversations[0])
    ratios = [a / b for a, b in zip(seconds["one by one"], seconds["engine"], strict=True)]
    return {
        "prompt_tokens": len(prompt.input_ids),
        "cpu_seconds": {name: round(statistics.median(s), 3) for name, s in seconds.items()},
        "ratio_of_cpu_time": round(statistics.median(ratios), 2),
        "equal_answers": sum(map(str.__eq__, found["engine"], found["one by one"])),
    }


def _endless_engine(
    model: LlamaAdapterForConditionalGeneration, processor: LlamaAdapterProcessor
) -> RowEngine:
    """An engine whose answers are as long as they may be, once it is ready."""
    processor.__class__ = _Endless
    model.generation_config.eos_token_id = None
    settings = EngineSettings(rows=ROWS, context_length=512)
    engine = RowEngine(model, processor, name="v2", settings=settings)
    while engine.health.state == "starting":
        time.sleep(0.01)
    return engine


def _together(engine: RowEngine, conversations: Sequence[Conversation]) -> list[str]:
    processor = engine.processor("v2")
    asked = [
        engine.submit(
            GenerationRequest(
                prompt=encode_prompt(processor, conversation),
                adapter="v2",
                sampling=Sampling(max_tokens=NEW_TOKENS),
            )
        )
        for conversation in conversations
    ]
    return ["".join(part.text for part in generation) for generation in asked]


class _Endless(LlamaAdapterProcessor):
    """Nothing ends an answer, so that all have as many tokens."""

    ends = ()
    stop_options: ClassVar = {}


def _forget_prefixes(engine: RowEngine) -> None:
    """Every turn reads its prompts and images anew, as the first one does."""

    def forget() -> None:
        for row in engine._cache.rows:
            row.owner, row.content = None, []
        engine._stack.release([image.entry for image in engine._images.values()])
        engine._images.clear()

    engine._calls.put(forget).result()


# --- many adapters -------------------------------------------------------------------------------


def stacked_steps(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """A decode step of 32 rows: base over one prepared adapter, and 100 adapters over that."""
    steps = {
        "base": decode_step(options, adapters=1, used=[0]),
        "prepared": decode_step(options, adapters=1, used=[1]),
        "mixed": decode_step(options, adapters=100, used=range(1, 101)),
    }
    rounds = options.rounds
    base, mixed = (
        interleaved({"prepared": steps["prepared"], name: steps[name]}, over=over, rounds=rounds)
        for name, over in (("base", "prepared"), ("mixed", "prepared"))
    )
    return base, mixed


@torch.no_grad()
def decode_step(
    options: argparse.Namespace, *, adapters: int, used: Sequence[int]
) -> Callable[[], None]:
    base = make_llama(options)
    stack = AdapterStack(base, capacity=adapters)
    for index in range(adapters):
        stack.add(f"{index}", _randomized(base, index))
    model = RowModel(base, stack, rows=ROWS, length=CONTEXT + 1)
    stack.attach()
    reads = [RowReads(adapter=used[row % len(used)]) for row in range(ROWS)]
    tokens = torch.randint(3, 1000, (ROWS, CONTEXT)).tolist()
    with torch.inference_mode():
        model.run(
            0, [Chunk(start=0, tokens=t, reads=r) for t, r in zip(tokens, reads, strict=True)]
        )
    chunks = [
        Chunk(start=CONTEXT, tokens=t[:1], reads=r) for t, r in zip(tokens, reads, strict=True)
    ]

    @torch.inference_mode()
    def step() -> None:
        model.run(0, chunks)

    return step


def _randomized(base: Any, seed: int) -> Adapter:
    config = LlamaAdapterConfig.preset("v2-chat").adapter_config
    generator = torch.Generator().manual_seed(seed)
    adapter = Adapter(base, config, generator=generator)
    for _, parameter in adapter.named_parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    adapter.detach()
    return adapter


# --- the first token -----------------------------------------------------------------------------


def first_token(options: argparse.Namespace) -> dict[str, Any]:
    """A prompt of 32 tokens and an image of 576 patches, on both ways to the first logits.

    The encoder has a twentieth of the base's parameters and the projector a hundredth, as CLIP
    ViT-L/14 and the projector of the released V2 models have of a 7B.
    """
    base = make_llama(options)
    torch.manual_seed(1)
    size = options.hidden // 4
    vision = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=size,
            intermediate_size=4 * size,
            num_hidden_layers=max(options.layers * 3 // 4, 1),
            num_attention_heads=4,
            image_size=336,
            patch_size=14,
        )
    ).eval()
    model = LlamaAdapterForConditionalGeneration.from_base(
        base,
        vision,
        LlamaAdapterConfig.preset("v2", projector_width=options.hidden // 8, projector_heads=4),
        seed=0,
    ).eval()
    model.disable_adapters()
    stack = AdapterStack(base)
    stack.add("v2", model.adapter, vision)
    rows = RowModel(base, stack, rows=1, length=128)
    projector = nn.Sequential(
        nn.Linear(size, options.hidden), nn.GELU(), nn.Linear(options.hidden, options.hidden)
    )
    image = torch.randn(1, 3, 336, 336)
    tokens = torch.randint(3, 1000, (1, 32))
    stack.attach()

    @torch.inference_mode()
    def adapted() -> None:
        [entry] = stack.encode("v2", image)
        reads = RowReads(adapter=stack["v2"].index, image=entry)
        rows.run(0, [Chunk(start=0, tokens=tokens[0].tolist(), reads=reads)])
        stack.release([entry])

    @torch.inference_mode()
    def prefixed() -> None:
        stack.select([RowReads()])
        features = vision(pixel_values=image).last_hidden_state
        embeds = base.get_input_embeddings()(tokens)
        embeds = torch.cat([projector(features), embeds], dim=1)
        assert embeds.shape[1] == IMAGE_TOKENS + 32
        base(inputs_embeds=embeds, use_cache=True, logits_to_keep=1)

    return interleaved(
        {"576 image tokens": prefixed, "adapter": adapted},
        over="adapter",
        rounds=max(options.rounds // 4, 5),
        warmup=1,
    )


# --- the server around the engine ----------------------------------------------------------------


def http(options: argparse.Namespace) -> dict[str, Any]:
    """Processor time of 32 streams over HTTP, without the clients', over the engine's alone."""
    processor = load_bundled("v2")[1]
    base = make_llama(
        argparse.Namespace(**{**vars(options), "vocabulary": len(processor.tokenizer)})
    )
    model = LlamaAdapterForConditionalGeneration.from_base(
        base, None, LlamaAdapterConfig.preset("v2-chat"), seed=0
    )
    engine = _endless_engine(model, processor)
    texts = [f"{index} Where is the star? Tell me all about it." for index in range(ROWS)]
    limits = Limits(request_seconds=3600)
    app, gate = make_app(Service(engine=engine, base_name="base", limits=limits))
    with bind("127.0.0.1", 0) as bound, ProcessPoolExecutor(1, get_context("spawn")) as clients:
        url = f"http://127.0.0.1:{bound.getsockname()[1]}/v1/chat/completions"
        server = Server(app, gate, engine, limits, drain_seconds=1)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        while not server.started:
            time.sleep(0.01)

        def over_http() -> None:
            _forget_prefixes(engine)
            found = clients.submit(stream_all, url, "v2", texts, NEW_TOKENS).result()
            assert found == [NEW_TOKENS] * ROWS, found

        def alone() -> None:
            _forget_prefixes(engine)
            _together(engine, [Conversation.ask(text) for text in texts])

        sides = {"http": over_http, "engine": alone}
        result = interleaved(sides, over="engine", rounds=max(options.rounds // 4, 5), warmup=1)
        server.should_exit = True
        thread.join()
    engine.drain(10)
    return result


def stream_all(url: str, model: str, texts: Sequence[str], tokens: int) -> list[int]:
    """Ask for streams of all answers at once, in a process of clients; the tokens of each."""

    async def stream(client: httpx2.AsyncClient, text: str) -> int:
        asked = {
            "model": model,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        async with client.stream("POST", url, json=asked) as response:
            lines = [line async for line in response.aiter_lines() if line.startswith("data: {")]
        events = [json.loads(line[6:]) for line in lines]
        if usage := events[-1].get("usage"):
            return int(usage["completion_tokens"])
        # transformers tells no usage: an answer that was cut off is as long as it may be
        ends = [choice.get("finish_reason") for e in events for choice in e.get("choices", ())]
        if "length" not in ends:
            raise RuntimeError(f"{url}: {lines[-1][:300]}")
        return tokens

    async def stream_them() -> list[int]:
        limits = httpx2.Limits(max_connections=len(texts))
        async with httpx2.AsyncClient(timeout=600, limits=limits) as client:
            return await asyncio.gather(*(stream(client, text) for text in texts))

    return asyncio.run(stream_them())


if __name__ == "__main__":
    main()
