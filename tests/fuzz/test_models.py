"""Damaged adapter directories, bases and encoders: the same logits as undamaged, or one line.

An accepted input is right where model and processor give the logits and token ids that the
undamaged files give. A base's or encoder's tensors carry no checksum and are sampled: there an
accepted input is right where what was loaded is, bit by bit, what the damaged file says.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load
from tests.fuzzing import Campaign, mutated_bytes, mutated_json, mutated_json_text
from torch.testing import assert_close

from llama_adapter import LlamaAdapterForConditionalGeneration, LlamaAdapterProcessor

pytestmark = pytest.mark.filterwarnings("ignore")
TEXT = "What colour is the star? 1 2 3"


def read(directory: Path) -> tuple[Any, torch.Tensor, list[int]]:
    model = LlamaAdapterForConditionalGeneration.from_pretrained(directory)
    processor = LlamaAdapterProcessor.from_pretrained(directory)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 100, (1, 5), generator=generator)
    pixels = torch.randn(1, 3, 8, 8, generator=generator)
    with torch.no_grad():
        logits = model(ids, pixel_values=pixels).logits
    return model, logits, list(processor.encode(TEXT).input_ids)


@pytest.fixture(scope="module")
def whole(adapter_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A stirred adapter with its base and encoder inside, saved by today's code, and its logits."""
    root = tmp_path_factory.mktemp("fuzz") / "mine"
    for name in ("base", "vision"):
        shutil.copytree(adapter_dir.parent / name, root / name)
    model = LlamaAdapterForConditionalGeneration.from_base(
        str(root / "base"),
        str(root / "vision"),
        LlamaAdapterForConditionalGeneration.from_pretrained(adapter_dir).config,
        seed=0,
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in model.adapter.named_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.save_pretrained(root)
    LlamaAdapterProcessor.from_pretrained(adapter_dir).save_pretrained(root)
    _, logits, ids = read(root)
    return root, (logits, ids)


def mutated(path: Path, rng: random.Random) -> bytes:
    data = path.read_bytes()
    if path.suffix == ".json":
        return mutated_json_text(json.loads(data), rng)
    length = 8 + int.from_bytes(data[:8], "little")
    kind = rng.randrange(4)
    if kind == 0:  # a header that is valid JSON
        header = json.dumps(mutated_json(json.loads(data[8:length]), rng)).encode()
        return len(header).to_bytes(8, "little") + header + data[length:]
    if kind == 1:  # anywhere in the header
        return mutated_bytes(data[:length], rng) + data[length:]
    if kind == 2:  # one bit of one tensor
        damaged = bytearray(data)
        damaged[rng.randrange(length, len(data))] ^= 1 << rng.randrange(8)
        return bytes(damaged)
    return mutated_bytes(data, rng)


def run(campaign: Campaign, files: tuple[str, ...], whole: Any, tmp_path: Path) -> None:
    source, (logits, ids) = whole
    copy = Path(shutil.copytree(source, tmp_path / "mine"))
    for rng in campaign:
        name = rng.choice(files)
        path = copy / name
        path.write_bytes(mutated(source / name, rng))

        def check(found: Any, name: str = name, path: Path = path) -> None:
            model, ours, tokens = found
            assert tokens == ids, name
            if name.endswith("/model.safetensors"):
                part = model.language_model if name.startswith("base") else model.vision
                with model.adapters_disabled():
                    loaded = dict(part.state_dict())
                for key, tensor in load(path.read_bytes()).items():
                    assert key not in loaded or torch.equal(loaded[key], tensor), (name, key)
            else:
                assert_close(ours, logits, rtol=1e-5, atol=1e-5, msg=name)

        campaign.attempt(lambda: read(copy), accepted=check)
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        shutil.copyfile(source / name, path)
    assert campaign.counts["refused"] > campaign.inputs // 4


def test_damaged_adapter_directories(whole: Any, tmp_path: Path) -> None:
    files = ("adapter_config.json", "adapter_config.json", "adapter_model.safetensors",
             "adapter_model.safetensors", "config.json", "processor_config.json",
             "tokenizer.json", "tokenizer_config.json")  # fmt: skip
    run(Campaign("adapter directories", inputs=34), files, whole, tmp_path)


def test_damaged_bases_and_encoders(whole: Any, tmp_path: Path) -> None:
    files = ("base/config.json", "base/config.json", "base/model.safetensors",
             "base/generation_config.json", "vision/config.json",
             "vision/model.safetensors")  # fmt: skip
    run(Campaign("bases and encoders", inputs=20), files, whole, tmp_path)
