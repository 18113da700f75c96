"""Runs that earlier code began go on with today's, and end with the adapters they would have."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from llama_adapter.model.persistence import ADAPTER_WEIGHTS_NAME
from llama_adapter.model.tensor_files import read_tensors
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
    end = read_tensors(Path(f"ends/{name}.safetensors"))
    recipe = load_recipe(Path(f"{name}.yaml"), ["compute.threads=1"])
    resumed = train(recipe, resume=True)
    assert resumed.started_at == 2
    assert resumed.steps == 5
    whole = train(load_recipe(Path(f"{name}.yaml"), ["compute.threads=1", "out=whole"]))
    found, expected = (
        read_tensors(result.adapter / ADAPTER_WEIGHTS_NAME) for result in (resumed, whole)
    )
    exact = all(torch.equal(expected[key], end[key]) for key in end)
    for tensors in (found, expected):
        assert_close(tensors, end, **({"rtol": 0, "atol": 0} if exact else {}))
    if name == "lora":
        ends = (result.adapter / "lora" / ADAPTER_WEIGHTS_NAME for result in (resumed, whole))
        assert_close(*map(read_tensors, ends))
