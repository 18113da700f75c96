"""The tool that makes the package's photos model of a trained adapter."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tools.photos import bundle as tool

from llama_adapter import CheckpointError, LlamaAdapterForConditionalGeneration
from llama_adapter.conversation import Conversation, ImageRef
from llama_adapter.model.configuration import read_adapter_config
from llama_adapter.model.equivalence import EQUIVALENCE_NAME
from llama_adapter.model.persistence import ADAPTER_WEIGHTS_NAME, check_header, read_checked
from llama_adapter.photos.bundled import bundled_adapter
from llama_adapter.photos.gallery import EXAMPLES
from llama_adapter.processing.processor import LlamaAdapterProcessor
from llama_adapter.training.recipe import load_recipe


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text("seed: 3\ncompute: {device: cpu, autocast: bfloat16}\n")
    rows = ('{"step": 1, "seconds": 90}', '{"step": 2, "seconds": 30}', '{"step": 2, "eval": 1}')
    (folder / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    return folder


RESULTS = {
    "Captions": {"BLEU-4": {"value": 12.345, "interval": [11, 13.5]}},
    "Questions": {"metrics": {"accuracy": 30.5}, "intervals": {"accuracy": [28, 33]}},
}


def test_an_adapter_becomes_the_package_s(run: Path, photos_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "package" / "adapter"
    tool.bundle([run], photos_model, out, results=RESULTS)
    stored = load_file(out / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    assert (out / EQUIVALENCE_NAME).is_file()
    card = (out / "README.md").read_text()
    assert "| BLEU-4 | 12.35 | 11.00 – 13.50 |" in card or "| BLEU-4 | 12.34 |" in card
    assert "| accuracy | 30.50 | 28.00 – 33.00 |" in card
    assert "from 2 steps in 2 minutes" in card
    assert "| `recipes/run.yaml`, seed 3 | 2 | 2 | cpu, bfloat16, " in card


def test_a_training_goes_on_from_a_bundled_adapter(
    run: Path, photos_model: Path, tmp_path: Path
) -> None:
    tool.bundle([run], photos_model, tmp_path / "first", results={})
    with pytest.raises(CheckpointError, match=r"its card lists recipes/run\.yaml, seed 3 already"):
        tool.bundle([run], photos_model, tmp_path / "both", results={}, after=tmp_path / "first")
    (run / "recipe.yaml").write_text("seed: 4\n")  # the same recipe again, with other samples
    again = shutil.copytree(run, tmp_path / "next")
    further = {"after": tmp_path / "first", "hardware": "two GPUs"}
    tool.bundle([run, again], photos_model, tmp_path / "both", results={}, **further)
    card = (tmp_path / "both/README.md").read_text()
    assert "| `recipes/run.yaml`, seed 3 | 2 | 2 | cpu, bfloat16, " in card
    for name in ("run", "next"):
        assert f"| `recipes/{name}.yaml`, seed 4 | 2 | 2 | two GPUs |" in card
    assert "from 6 steps in 6 minutes" in card


def test_half_precision_loads_on_a_float32_base(
    run: Path, photos_model: Path, tmp_path: Path
) -> None:
    tool.bundle([run], photos_model, tmp_path / "half", results={})
    prompt = Conversation.ask("What is it?", images=[ImageRef.of(EXAMPLES / "cat.jpg")])
    logits = []
    for directory in (photos_model, tmp_path / "half"):
        model = LlamaAdapterForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        inputs: Any = LlamaAdapterProcessor.from_pretrained(directory)([prompt])
        with torch.no_grad():
            logits.append(model(**inputs).logits)
    torch.testing.assert_close(*logits, atol=0.01, rtol=0.01)


def test_one_that_is_too_large_is_refused(
    run: Path, photos_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool, "MAX_BYTES", 1000)
    with pytest.raises(CheckpointError, match="at most 1,000 may be"):
        tool.bundle([run], photos_model, tmp_path / "out", results={})
    assert not (tmp_path / "out").exists()


def test_what_a_run_did_otherwise_than_its_recipe_is_on_the_card(
    run: Path, photos_model: Path, tmp_path: Path
) -> None:
    ran = run.rename(tmp_path / "photos-more")
    changes = ["seed=1", "steps=3", "captions.sources.0.seed=6", "captions.sources.0.path=x.json"]
    changes += ["captions.start=0.2"]
    recipe = load_recipe(tool.RECIPES / "photos-more.yaml", changes)
    (ran / "recipe.yaml").write_text(recipe.to_yaml())
    out = tmp_path / "out"
    tool.bundle([ran], photos_model, out, results={})
    told = "photos-more.yaml`, seed 1 captions.sources.0.seed=6 captions.start=0.2 | 2 | 2 | cpu, "
    assert told in (out / "README.md").read_text()
    (ran / "recipe.yaml").write_text(recipe.to_yaml().replace("seed: 6", "seed: 7"))
    tool.bundle([ran], photos_model, tmp_path / "next", results={}, after=out)
    assert (
        "captions.sources.0.seed=7 captions.start=0.2 | 2 |"
        in (tmp_path / "next/README.md").read_text()
    )


def test_the_package_s_own_files_belong_together() -> None:
    """Without its base nothing else reads them."""
    folder = bundled_adapter()
    assert check_header(folder / ADAPTER_WEIGHTS_NAME, read_adapter_config(folder)).metadata
    state = read_checked(folder / ADAPTER_WEIGHTS_NAME)
    assert sum(tensor.numel() for tensor in state.values()) == 4_362_447
