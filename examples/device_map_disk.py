"""Train an adapter on a base that does not fit into memory: parts of it stay on disk.

    python examples/device_map_disk.py BASE VISION OUT

The base's layers are fetched from disk one by one in each pass. The adapter and the vision encoder
are never offloaded: they live where the base computes, learn as always, and the saved adapter is
the one that a base in memory would have given.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoConfig

from llama_adapter import LlamaAdapterConfig, LlamaAdapterForConditionalGeneration


def disk_map(base: str, *, resident: int) -> dict[str, str]:
    """The first `resident` layers in memory, the others and the final norm on disk."""
    layers = AutoConfig.from_pretrained(base).num_hidden_layers
    places = {f"model.layers.{n}": "cpu" if n < resident else "disk" for n in range(layers)}
    ends = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    return {**ends, **places, "model.norm": "disk"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base")
    parser.add_argument("vision")
    parser.add_argument("out", type=Path)
    parser.add_argument("--resident", type=int, default=1, help="layers to keep in memory")
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    model = LlamaAdapterForConditionalGeneration.from_base(
        options.base,
        options.vision,
        LlamaAdapterConfig.preset("v2"),
        seed=0,
        device_map=disk_map(options.base, resident=options.resident),
        offload_folder=options.out / "offload",
    )
    trainable = [*model.group_parameters("vision"), *model.group_parameters("language")]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    # stands for your data: one image and what should be said of it
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, model.config.vocab_size, (1, 12), generator=generator)
    size = model.vision.config.image_size
    image = torch.randn(1, 3, size, size, generator=generator)
    model.train()
    for step in range(options.steps):
        loss = model(tokens, pixel_values=image, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}: loss {loss.item():.6f}")
    model.eval()
    answer = model.generate(
        tokens[:, :4], pixel_values=image, max_new_tokens=5, do_sample=False, pad_token_id=0
    )
    print("tokens:", answer[0].tolist())
    model.save_pretrained(options.out)


if __name__ == "__main__":
    main()
