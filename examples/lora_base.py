"""Train an adapter on a base that was fine-tuned with peft's LoRA, without merging the two.

    python examples/lora_base.py LORA_DIR OUT

Base and LoRA stay frozen. The saved directory names the base and holds the LoRA beside the adapter,
so `from_pretrained(OUT)` gives what was trained.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from llama_adapter import LlamaAdapterConfig, LlamaAdapterForConditionalGeneration


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("lora", help="directory or hub name of a peft adapter")
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    model = LlamaAdapterForConditionalGeneration.from_base(
        options.lora, config=LlamaAdapterConfig.preset("v2-chat"), seed=0
    )
    optimizer = torch.optim.AdamW(model.group_parameters("language"), lr=1e-2)
    # stands for your data
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, model.config.vocab_size, (1, 12), generator=generator)
    model.train()
    for step in range(options.steps):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}: loss {loss.item():.6f}")
    model.eval()
    model.save_pretrained(options.out)
    with torch.no_grad():
        trained = model(tokens).logits
        loaded = LlamaAdapterForConditionalGeneration.from_pretrained(options.out)
        difference = (loaded(tokens).logits - trained).abs().max().item()
    print(f"largest difference after loading: {difference}")


if __name__ == "__main__":
    main()
