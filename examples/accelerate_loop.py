"""Train an adapter in a loop of your own with accelerate, on one device or many.

    accelerate launch examples/accelerate_loop.py BASE VISION DATA OUT

BASE and VISION are names or folders of models. Each line of DATA is a JSON object with "question",
"answer" and, where there is one, "image": a path relative to DATA.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from itertools import chain, islice, repeat
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from llama_adapter import (
    Conversation,
    LlamaAdapterConfig,
    LlamaAdapterForConditionalGeneration,
    LlamaAdapterProcessor,
)
from llama_adapter.processing.image_processors import load_image_processor


def read_talks(path: Path) -> list[Conversation]:
    talks = []
    for line in path.read_text().splitlines():
        record = json.loads(line)
        images = [path.parent / record["image"]] if "image" in record else []
        talk = Conversation.ask(record["question"], images=images, answer=record["answer"])
        talks.append(talk)
    return talks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base")
    parser.add_argument("vision")
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--template", default="chat", help="alpaca for a base without a chat one")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--accumulate", type=int, default=1)
    options = parser.parse_args()

    # a batch without images leaves what reads them without gradients
    replicas = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(kwargs_handlers=[replicas])
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    images = load_image_processor(options.vision)
    processor = LlamaAdapterProcessor(images, tokenizer, template=options.template)
    adapted = LlamaAdapterForConditionalGeneration.from_base(
        options.base, options.vision, LlamaAdapterConfig.preset("v2"), seed=0
    ).train()
    trainable = [*adapted.group_parameters("vision"), *adapted.group_parameters("language")]
    talks = DataLoader(
        read_talks(options.data),  # type: ignore[arg-type]
        batch_size=options.batch_size,
        shuffle=True,
        collate_fn=lambda rows: processor(rows, labels=True),
    )
    optimizer = torch.optim.AdamW(trainable, lr=1e-3)
    model, optimizer, loader = accelerator.prepare(adapted, optimizer, talks)

    batches = chain.from_iterable(repeat(loader))
    for step in range(options.steps):
        group = list(islice(batches, options.accumulate))
        # the loss is a mean over the answer tokens of the whole step, on all devices
        scored = sum((batch["labels"][:, 1:] != -100).sum() for batch in group)
        total = accelerator.reduce(scored)
        mean = torch.zeros((), device=accelerator.device)
        for index, batch in enumerate(group):
            is_last = index == len(group) - 1
            with contextlib.nullcontext() if is_last else accelerator.no_sync(model):
                loss = model(**batch, num_answer_tokens=total).loss
                # replicas average their gradients
                accelerator.backward(loss * accelerator.num_processes)
            mean += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        accelerator.print(f"step {step + 1}: loss {accelerator.reduce(mean).item():.6f}")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(options.out)
        processor.save_pretrained(options.out)


if __name__ == "__main__":
    main()
