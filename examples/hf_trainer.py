"""Train an adapter with Hugging Face's Trainer, resume, and keep the best checkpoint.

    python examples/hf_trainer.py BASE VISION DATA OUT [--resume]

BASE and VISION are names or folders of models. Each line of DATA is a JSON object with "question",
"answer" and, where there is one, "image": a path relative to DATA.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from transformers import AutoTokenizer, Trainer, TrainingArguments

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
    parser.add_argument("--save-every", type=int, default=50)
    parser.add_argument("--resume", action="store_true", help="from the last checkpoint in OUT")
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.base)
    images = load_image_processor(options.vision)
    processor = LlamaAdapterProcessor(images, tokenizer, template=options.template)
    model = LlamaAdapterForConditionalGeneration.from_base(
        options.base, options.vision, LlamaAdapterConfig.preset("v2"), seed=0
    )
    talks = read_talks(options.data)
    held_out = talks[: max(1, len(talks) // 10)]
    trainer = Trainer(
        model,
        TrainingArguments(
            options.out,
            per_device_train_batch_size=options.batch_size,
            per_device_eval_batch_size=options.batch_size,
            gradient_accumulation_steps=options.accumulate,
            max_steps=options.steps,
            learning_rate=1e-3,
            logging_steps=10,
            eval_strategy="steps",
            eval_steps=options.save_every,
            save_steps=options.save_every,
            load_best_model_at_end=True,
            # the data are conversations, not columns: the collator makes them what the model takes
            remove_unused_columns=False,
            label_names=["labels"],
            report_to=[],
        ),
        data_collator=lambda rows: processor(rows, labels=True),
        train_dataset=talks[len(held_out) :],
        eval_dataset=held_out,
        processing_class=processor,
    )
    trainer.train(resume_from_checkpoint=options.resume)
    trainer.save_model()


if __name__ == "__main__":
    main()
