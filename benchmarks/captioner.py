"""What the features of a vision encoder allow: a small decoder trained end to end on them.

A transformer of words learns the same captions from the same frozen features as an adapter does,
without a language model, in less than an hour of a core. How far an adapter is behind it is what
there is to gain with this encoder at least.

python -m benchmarks.captioner --captions flickr8k/captions.json --predictions runs/captioner.json
llama-adapter eval coco-caption --predictions runs/captioner.json --data flickr8k/captions.json \
    --out runs/captions/captioner
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from benchmarks.measuring import describe
from benchmarks.photos import captioned, make_room, patch_features
from llama_adapter.cli.output import refusals
from llama_adapter.files import write_atomically

PAD, START, END, UNKNOWN = range(4)
LONGEST = 24
GRID = 6
"""Patches are averaged to GRID x GRID."""


class Captioner(nn.Module):
    """Words attend to earlier words and to the patches of a photo."""

    def __init__(self, channels: int, words: int, width: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.patches = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, width))
        self.places = nn.Parameter(torch.randn(GRID * GRID, width) * 0.02)
        self.words = nn.Embedding(words, width)
        nn.init.normal_(self.words.weight, std=width**-0.5)
        self.positions = nn.Parameter(torch.randn(LONGEST, width) * 0.02)
        layer = nn.TransformerDecoderLayer(
            width, width // 64, 4 * width, dropout, F.gelu, batch_first=True, norm_first=True
        )
        self.decoder = nn.TransformerDecoder(layer, layers, nn.LayerNorm(width))

    def forward(self, features: Tensor, words: Tensor) -> Tensor:
        """Logits [B, T, W] of what follows each word, from features [B, P, C] and words [B, T]."""
        length = words.shape[1]
        seen = self.patches(features) + self.places
        hidden = self.words(words) + self.positions[:length]
        causal = nn.Transformer.generate_square_subsequent_mask(length)
        hidden = self.decoder(hidden, seen, tgt_mask=causal, tgt_is_causal=True)
        return hidden @ self.words.weight.T

    @torch.no_grad()
    def describe(self, features: Tensor) -> list[list[int]]:
        """Greedy, as the adapter's captions."""
        words = torch.full((len(features), 1), START)
        while words.shape[1] < LONGEST and not (words == END).any(1).all():
            logits = self(features, words)[:, -1]
            logits[:, [PAD, START, UNKNOWN]] = -torch.inf
            words = torch.cat([words, logits.argmax(-1, keepdim=True)], 1)
        return [row[1 : [*row, END].index(END)] for row in words.tolist()]


def pooled_features(photos: Sequence[Path], options: argparse.Namespace) -> Tensor:
    """[I, P, C] in half precision, averaged to GRID x GRID patches."""
    found = []
    for patches in patch_features(photos, options):
        _, count, channels = patches.shape
        side = round(count**0.5)
        square = patches.transpose(1, 2).reshape(1, channels, side, side)
        pooled = F.adaptive_avg_pool2d(square, GRID)
        found.append(pooled.flatten(2).transpose(1, 2).half())
    return torch.cat(found)


def train(options: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(options.seed)
    make_room(options.predictions)
    items = captioned(options.captions)
    parts = {s: [item for item in items if item["split"] == s] for s in ("train", "test")}
    folder = options.images or options.captions.parent
    features = {
        name: pooled_features([folder / item["image"] for item in part], options)
        for name, part in parts.items()
    }
    texts = [[_words(c) for c in item["captions"]] for item in parts["train"]]
    counts = Counter(word for some in texts for words in some for word in words)
    names = ["", "", "", "", *(word for word, count in counts.items() if count >= options.least)]
    number = {word: n for n, word in enumerate(names) if word}
    rows = [
        (image, torch.tensor([START, *(number.get(w, UNKNOWN) for w in words), END][:LONGEST]))
        for image, some in enumerate(texts)
        for words in some
    ]
    model = Captioner(
        features["train"].shape[-1], len(names), options.width, options.layers, options.dropout
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.05)
    steps = options.epochs * (len(rows) // options.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, steps, pct_start=0.1)
    began, losses = time.perf_counter(), []
    bar = tqdm(total=steps, desc="steps")
    for _ in range(options.epochs):
        for some in _batches(rows, options.batch):
            words = nn.utils.rnn.pad_sequence([w for _, w in some], batch_first=True)
            logits = model(features["train"][[n for n, _ in some]].float(), words[:, :-1])
            loss = F.cross_entropy(
                logits.flatten(0, 1), words[:, 1:].flatten(), ignore_index=PAD, label_smoothing=0.1
            )
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            bar.update()
            bar.set_postfix(loss=f"{sum(losses[-100:]) / len(losses[-100:]):.3f}")
    took = time.perf_counter() - began
    model.eval()
    answers = _described(model, features["test"], [i["image"] for i in parts["test"]], names)
    write_atomically(options.predictions, json.dumps(answers, indent=1) + "\n")
    return {
        "steps": steps,
        "minutes": took / 60,
        "vocabulary": len(number),
        "parameters": sum(p.numel() for p in model.parameters()),
        "loss": sum(losses[-200:]) / len(losses[-200:]),
        "photos": len(answers),
    }


def _described(
    model: Captioner, features: Tensor, images: Sequence[str], names: Sequence[str]
) -> list[dict[str, str]]:
    """In COCO's result format."""
    found = [c for some in features.split(64) for c in model.describe(some.float())]
    return [
        {"image_id": Path(image).stem, "caption": " ".join(names[n] for n in caption)}
        for image, caption in zip(images, found, strict=True)
    ]


def _batches(rows: Sequence[tuple[int, Tensor]], size: int) -> Iterator[list[tuple[int, Tensor]]]:
    """Full batches in random order, each of captions of like length."""
    order = sorted(torch.randperm(len(rows)).tolist(), key=lambda n: len(rows[n][1]))
    # what fills no batch is left out, longest or shortest by chance
    order = order[int(torch.randint(len(rows) % size + 1, ())) :]
    for batch in torch.randperm(len(rows) // size).tolist():
        yield [rows[n] for n in order[batch * size : (batch + 1) * size]]


def _words(caption: str) -> list[str]:
    return [word for word in caption.lower().replace(".", " ").split() if word != ","]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--captions", type=Path, required=True, help="with `split` in each record")
    parser.add_argument("--images", type=Path, help="their folder, by default that of the captions")
    parser.add_argument("--predictions", type=Path, default=Path("runs/captioner.json"))
    parser.add_argument("--vision", default="home:photos/vision")
    parser.add_argument("--layer", type=int, default=11)
    parser.add_argument(
        "--cache",
        type=Path,
        help="features of this encoder and layer: a folder in a vision.cache_folder",
    )
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=128, help="captions a step")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--least", type=int, default=4, help="how often a word must occur")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="also write the JSON there")
    parser.add_argument("--device", default="cpu", help=argparse.SUPPRESS)
    options = parser.parse_args()
    with refusals():
        _measure(options)


def _measure(options: argparse.Namespace) -> None:
    make_room(options.out)
    text = json.dumps(describe("captioner", train(options), options=options), indent=2, default=str)
    print(text)
    if options.out is not None:
        write_atomically(options.out, text + "\n")


if __name__ == "__main__":
    main()
