"""Training speed: packed rows against padded ones, one step against peers, and a 7B shape on a GPU.

    python -m benchmarks.train packing --shared ../shared/real
    python -m benchmarks.train step --litgpt-python .venv-litgpt/bin/python
    python -m benchmarks.train large --device cuda --dtype bfloat16 --rows 1 --tokens 4096

packing  answer tokens a second on Alpaca records and photos with captions: rows of 512 tokens with
         many samples each, against one sample a row padded to 512 (the released code's way). Same
         trainer, same base, same number of places a step; the sides take turns.
step     forward, backward and optimizer on one batch, ours against peft (see benchmarks.step) and
         against litgpt's adapter_v2, which runs in an environment of its own and takes turns too.
large    7B shape of random numbers: tokens a second and model-flops utilization. A frozen base
         costs 4 flops a number and token: 2 forward, 2 backward to activations, 0 to weights.

Targets: packed at least 3 times padded; a step no slower than the fastest peer, in no more memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import step as steps
from benchmarks.measuring import (
    add_options,
    interleaved,
    make_llama,
    make_vision_encoder,
    peak_memory,
    report,
    reset_peak_memory,
    synchronized,
)
from llama_adapter import LlamaAdapterConfig, LlamaAdapterForConditionalGeneration
from llama_adapter.training.build import build, load_processor
from llama_adapter.training.joint import JointTrainer
from llama_adapter.training.recipe import OptimizerSection, Recipe, parse_recipe
from llama_adapter.training.streams import open_data

ROW = 512
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
"""Dense bfloat16, of the makers' data sheets."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("part", choices=PARTS)
    add_options(parser, rounds=10)
    parser.add_argument("--shared", type=Path, default=Path("../shared/real"))
    parser.add_argument("--rows", type=int, default=4, help="rows of a batch")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--quantized", action="store_true", help="large: the base in 4 bits")
    parser.add_argument("--litgpt-python", help="an interpreter that has litgpt")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = PARTS[options.part](options)
    report(f"train-{options.part}", results, targets={}, options=options)


# --- packing --------------------------------------------------------------------------------


def _packing(options: argparse.Namespace) -> dict[str, Any]:
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        _save_models(Path(folder), options)
        for kind in ("instruction", "caption"):
            sides, counts = {}, {}
            for padding in ("max_length", "packed"):
                recipe = _recipe(options, Path(folder), kind, padding)
                counts[padding] = []
                sides[padding] = synchronized(_turns(recipe, kind, counts[padding]), options.device)
            timed = interleaved(sides, over="max_length", rounds=options.rounds, warmup=1)
            # a place costs the same on both sides, so a turn of each is compared by what it scored
            mean = {name: sum(found) / len(found) for name, found in counts.items()}
            speed = {n: 1e3 * mean[n] / timed["milliseconds"][n] for n in sides}
            ratio = speed["packed"] / speed["max_length"]
            results[kind] = {
                "answer_tokens_a_step": {name: round(value, 1) for name, value in mean.items()},
                "milliseconds_a_step": timed["milliseconds"],
                "answer_tokens_a_second": {name: round(v, 1) for name, v in speed.items()},
                "ratio": round(ratio, 2),
                "target": 3.0,
                "met": ratio >= 3.0,
            }
    return results


def _turns(recipe: Recipe, kind: str, counts: list[int]) -> Callable[[], None]:
    """A training step of one kind, data included; notes what it scored."""
    processor = load_processor(recipe)
    stream = open_data(recipe, processor).streams[kind]  # type: ignore[index]
    model = build(recipe, device=torch.device(recipe.compute.device or "cpu")).model
    half = torch.bfloat16 if recipe.compute.autocast == "bfloat16" else None
    trainer = JointTrainer(model, OptimizerSection(), steps=10_000, autocast_dtype=half)

    def turn() -> None:
        batch = next(stream)
        counts.append(trainer.step(**{kind: batch.inputs}).answer_tokens[kind])

    return turn


def _recipe(options: argparse.Namespace, folder: Path, kind: str, padding: str) -> Recipe:
    real = options.shared
    captions = {
        "type": "coco_captions",
        "path": str(real / "captions/flickr8k/captions.json"),
        "images": str(real / "captions/flickr8k"),
    }
    alpaca = {"type": "alpaca", "path": str(real / "instructions/alpaca_en_demo_999.json")}
    source = captions if kind == "caption" else alpaca
    section = {"rows": options.rows, "row_length": ROW, "sources": [source]}
    half = options.dtype == "bfloat16"
    return parse_recipe(
        {
            "out": str(folder / f"run-{kind}-{padding}"),
            "steps": 10_000,
            "base": {"model": str(folder / "base"), "dtype": options.dtype},
            "vision": {"model": str(folder / "vision")},
            "adapter": {"preset": "v2", "projector_width": options.hidden // 8},
            f"{kind}s": section,
            "data": {
                "padding": padding, "workers": 1, "too_long": "truncate", "cache": False,
            },
            "compute": {
                "device": options.device,
                "autocast": "bfloat16" if half else "none",
                "compile": options.compile,
            },
        }
    )  # fmt: skip


def _save_models(folder: Path, options: argparse.Namespace) -> None:
    """A random Llama with a tokenizer of the texts at hand, and a small vision encoder."""
    from transformers import SiglipImageProcessorPil

    model = make_llama(options)
    model.save_pretrained(folder / "base")
    _tokenizer(options.shared, model.config.vocab_size).save_pretrained(folder / "base")
    make_vision_encoder(options).save_pretrained(folder / "vision")
    SiglipImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder / "vision")


def _tokenizer(shared: Path, size: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<pad>", "</s>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(shared), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


def _texts(shared: Path) -> Iterator[str]:
    for record in json.loads((shared / "instructions/alpaca_en_demo_999.json").read_text()):
        yield f"{record['instruction']}\n{record.get('input', '')}\n{record['output']}"
    for record in json.loads((shared / "captions/flickr8k/captions.json").read_text()):
        yield from record["captions"]


# --- one step against peers -----------------------------------------------------------------


def _step(options: argparse.Namespace) -> dict[str, Any]:
    """Ours, peft's and litgpt's step in turn; memory of each in a process of its own."""
    options.side = None
    sides = {
        name: synchronized(make(options), options.device) for name, make in steps.SIDES.items()
    }
    grown = {name: steps._memory_in_a_process(name, options) for name in sides}
    litgpt, why_not = _litgpt(options)
    if litgpt is not None:
        sides["litgpt"] = litgpt.step
    results: dict[str, Any] = {}
    for ours, peers in {"v1": ("adaption_prompt",), "v2": ("lora", "litgpt")}.items():
        for peer in peers:
            if peer not in sides:
                results[f"{ours} over {peer}"] = {"not run": why_not}
                continue
            pair = {peer: sides[peer], ours: sides[ours]}
            found = interleaved(pair, over=peer, rounds=options.rounds, warmup=2)
            if peer == "litgpt" and litgpt is not None:
                # processor time of another process is not seen from here
                found = {k: v for k, v in found.items() if "cpu" not in k}
                grown[peer] = litgpt.peak_growth()
            found["memory_ratio"] = round(grown[ours] / grown[peer], 3)
            found["peak_growth_mebibytes"] = {
                name: round(grown[name] / 2**20, 1) for name in (peer, ours)
            }
            found["no_slower"] = found["ratio"] <= 1.0
            found["no_larger"] = found["memory_ratio"] <= 1.0
            results[f"{ours} over {peer}"] = found
    if litgpt is not None:
        litgpt.close()
    return results


class _Litgpt:
    """litgpt's step in another interpreter, which makes one for each line it is sent."""

    def __init__(self, python: str, options: argparse.Namespace) -> None:
        command = [python, str(Path(__file__).with_name("litgpt_step.py"))]
        for name in ("device", "dtype", "hidden", "layers", "batch", "tokens", "threads"):
            command += [f"--{name}", str(getattr(options, name))]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.ready = json.loads(self._line() or "{}")

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def _ask(self, what: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._line())
        return answer

    def step(self) -> None:
        self._ask("step")

    def peak_growth(self) -> int:
        return int(self._ask("memory")["bytes"])

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def _litgpt(options: argparse.Namespace) -> tuple[_Litgpt | None, str]:
    if not options.litgpt_python:
        return None, "no --litgpt-python was given"
    peer = _Litgpt(options.litgpt_python, options)
    if not peer.ready:
        peer.close()
        return None, f"{options.litgpt_python} could not start benchmarks/litgpt_step.py"
    return peer, ""


# --- a large model --------------------------------------------------------------------------


def _large(options: argparse.Namespace) -> dict[str, Any]:
    """Packed rows through a 7B shape; the instruction loss, which reaches every layer."""
    device = torch.device(options.device)
    model = LlamaAdapterForConditionalGeneration.from_base(
        _large_base(options), None, LlamaAdapterConfig.preset("v2-chat", prompt_layers=31), seed=0
    )
    model.train()
    if options.compile:
        for layer in model.language_model.get_decoder().layers:
            layer.compile()
    half = torch.bfloat16 if options.dtype == "bfloat16" else None
    trainer = JointTrainer(model, OptimizerSection(), steps=10_000, autocast_dtype=half)
    batch = _packed(options, device)
    frozen = sum(p.numel() for p in _frozen_linears())
    for _ in range(3):
        trainer.step(instruction=batch)
    before = reset_peak_memory(options.device)
    seconds = []
    for _ in range(options.rounds):
        synchronized(lambda: None, options.device)()
        start = time.perf_counter()
        synchronized(lambda: trainer.step(instruction=batch), options.device)()
        seconds.append(time.perf_counter() - start)
    spent = sorted(seconds)[len(seconds) // 2]
    tokens = batch["input_ids"].numel()
    speed = tokens / spent
    flops = 4 * frozen * speed
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    peak = next((p for kind, p in PEAK_FLOPS.items() if kind in name), None)
    return {
        "tokens_a_second": round(speed),
        "milliseconds_a_step": round(1e3 * spent, 1),
        "flops_a_second": flops,
        "formula": f"4 flops x {frozen:,} numbers of the base's linears and head x tokens",
        "utilization": None if peak is None else round(flops / peak, 3),
        "peak_memory_gibibytes": round(peak_memory(options.device) / 2**30, 2),
        "in_use_before_gibibytes": round(before / 2**30, 2),
    }


def _large_config() -> LlamaConfig:
    """LLaMA 7B's."""
    return LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=4096,
        eos_token_id=None,
    )


def _large_base(options: argparse.Namespace) -> LlamaForCausalLM:
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    with torch.device(options.device):
        model = LlamaForCausalLM._from_config(_large_config(), dtype=dtype)
    if not options.quantized:
        return model.eval()
    from transformers import BitsAndBytesConfig

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        del model
        settings = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
        return LlamaForCausalLM.from_pretrained(
            folder, quantization_config=settings, device_map={"": options.device}, dtype=dtype
        )


def _frozen_linears() -> Iterator[torch.nn.Parameter]:
    """What a token is multiplied with: all but the embeddings, which are looked up."""
    with torch.device("meta"):
        model = LlamaForCausalLM(_large_config())
    yield from (p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n)


def _packed(options: argparse.Namespace, device: torch.device) -> dict[str, torch.Tensor]:
    """Rows of samples of 256 tokens, of which the second half is scored."""
    length = 256
    shape = (options.rows, options.tokens)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 32000, shape, generator=generator)
    positions = torch.arange(options.tokens).remainder(length).expand(shape).contiguous()
    labels = ids.masked_fill(positions < length // 2, -100)
    batch = {"input_ids": ids, "labels": labels, "position_ids": positions}
    return {name: tensor.to(device) for name, tensor in batch.items()}


PARTS = {"packing": _packing, "step": _step, "large": _large}

if __name__ == "__main__":
    sys.exit(main())
