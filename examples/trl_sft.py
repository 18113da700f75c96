"""Train an adapter with TRL's SFTTrainer, in one of its four ways.

    python examples/trl_sft.py BASE VISION DATA OUT --way messages

    messages    conversations with images; the loss is on the assistant's turns
    completion  prompt and completion, with images; the loss is on the completion
    text        whole texts, by the processor; the loss is on all of them
    tokenizer   the same by the tokenizer alone

BASE and VISION are names or folders of models. Each line of DATA is a JSON object with "question",
"answer" and "image", a path relative to DATA; the last two ways leave images out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from llama_adapter import (
    LlamaAdapterConfig,
    LlamaAdapterForConditionalGeneration,
    LlamaAdapterProcessor,
    load_image,
)
from llama_adapter.processing.image_processors import load_image_processor


def read_rows(path: Path, way: str, processor: LlamaAdapterProcessor) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for line in path.read_text().splitlines():
        record = json.loads(line)
        question = [{"role": "user", "content": record["question"]}]
        answer = [{"role": "assistant", "content": record["answer"]}]
        if way in {"text", "tokenizer"}:
            rows.append({"text": str(processor.apply_chat_template(question + answer))})
            continue
        images = [load_image(path.parent / record["image"])]
        if way == "messages":
            rows.append({"images": images, "messages": question + answer})
        else:
            rows.append({"images": images, "prompt": question, "completion": answer})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base")
    parser.add_argument("vision")
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    ways = ["messages", "completion", "text", "tokenizer"]
    parser.add_argument("--way", choices=ways, default="messages")
    parser.add_argument("--template", default="chat", help="alpaca for a base without a chat one")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.base)
    images = load_image_processor(options.vision)
    processor = LlamaAdapterProcessor(images, tokenizer, template=options.template)
    # plain strings of a data set are rendered texts here, no questions
    processor.rendered = True
    model = LlamaAdapterForConditionalGeneration.from_base(
        options.base, options.vision, LlamaAdapterConfig.preset("v2"), seed=0
    )
    trainer = SFTTrainer(
        model,
        SFTConfig(
            options.out,
            per_device_train_batch_size=options.batch_size,
            max_steps=options.steps,
            learning_rate=1e-3,
            logging_steps=1,
            assistant_only_loss=options.way == "messages",
            bf16=torch.cuda.is_available(),
            report_to=[],
        ),
        train_dataset=Dataset.from_list(read_rows(options.data, options.way, processor)),
        processing_class=processor.tokenizer if options.way == "tokenizer" else processor,
    )
    trainer.train()
    model.save_pretrained(options.out)
    processor.save_pretrained(options.out)


if __name__ == "__main__":
    main()
