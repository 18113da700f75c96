"""Runs that earlier code began go on with today's, and end with the adapters they would have."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from torch.testing import assert_close

from llama_adapter.model.persistence import ADAPTER_WEIGHTS_NAME, read_tensors
from llama_adapter.training.launch import train
from llama_adapter.training.recipe import load_recipe

SAVED = Path(__file__).resolve().parents[1] / "saved/runs"


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers by an old name
@pytest.mark.parametrize("name", ["joint", "lora"])
def test_a_saved_run_ends_as_when_it_was_saved(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit on machines that round as the one where it was saved, else to rounding."""
    if name == "lora":
        pytest.importorskip("peft")
    shutil.copytree(SAVED, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    end = json.loads(Path("ends.json").read_text())[name]
    recipe = load_recipe(Path(f"{name}.yaml"), ["compute.threads=1"])
    resumed = train(recipe, resume=True)
    assert resumed.started_at == 2
    assert resumed.steps == 5
    whole = train(load_recipe(Path(f"{name}.yaml"), ["compute.threads=1", "out=whole"]))
    if whole.checksum == end:
        assert resumed.checksum == end
    for inner in (ADAPTER_WEIGHTS_NAME, "lora/adapter_model.safetensors"):
        if (whole.adapter / inner).exists():
            assert_close(read_tensors(resumed.adapter / inner), read_tensors(whole.adapter / inner))
