"""Small files of every format, and streams over them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llama_adapter import LlamaAdapterProcessor
from llama_adapter.data import SOURCES, BatchStream, Component, SampleEncoder, Source, measure

WORDS = """
    red star blue circle small large the a is in of picture what where how many
""".split()  # noqa: SIM905


def text_of(rng: np.random.Generator, words: int) -> str:
    return " ".join(rng.choice(WORDS, words))


def write_pictures(folder: Path, count: int) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(1)
    names = [f"picture{number}.png" for number in range(count)]
    for name in names:
        pixels = rng.integers(0, 255, (10, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return names


def write_alpaca(path: Path, count: int, *, lines: bool = False) -> Path:
    rng = np.random.default_rng(2)
    records = [
        {
            "instruction": text_of(rng, int(rng.integers(2, 6))) + "?",
            "input": text_of(rng, 3) if number % 3 == 0 else "",
            "output": text_of(rng, int(rng.integers(1, 14))),
        }
        for number in range(count)
    ]
    text = "\n".join(map(json.dumps, records)) + "\n" if lines else json.dumps(records, indent=1)
    path.write_text(text)
    return path


def write_pairs(folder: Path, count: int, *, pictures: int = 5) -> Path:
    rng = np.random.default_rng(3)
    names = write_pictures(folder / "pictures", pictures)
    rows = [f"pictures/{names[i % pictures]}\t{text_of(rng, 3 + i % 5)}" for i in range(count)]
    path = folder / "pairs.tsv"
    path.write_text("\n".join(["url\tcaption", *rows]) + "\n")
    return path


def open_source(type_: str, kind: str, **options: Any) -> Source:
    return SOURCES[type_].model_validate(options).open(kind)  # type: ignore[arg-type]


def stream_of(
    source: Source, processor: LlamaAdapterProcessor, kind: str, **options: Any
) -> BatchStream:
    settings = {"rows": 2, "row_length": 256, "seed": 0, **options}
    encoder = SampleEncoder(processor, row_length=settings["row_length"])
    component = Component(source=source, pieces=measure(source, encoder))
    return BatchStream(kind, [component], encoder, **settings)  # type: ignore[arg-type]
