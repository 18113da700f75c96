"""A folder with a base neither holds up whoever opens it nor reaches beyond itself."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma2Config

from llama_adapter import CheckpointError
from llama_adapter.model.references import load_language_model, load_vision


@pytest.fixture
def folder(base, tmp_path):
    base().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def configure(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def as_pickle(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def refused(folder, message):
    with pytest.raises(CheckpointError, match=message) as fault:
        load_language_model(str(folder))
    assert "\n" not in str(fault.value)
    assert len(str(fault.value)) < 500


def test_lists_that_a_config_makes_of_its_numbers_are_bounded(folder):
    """transformers makes them while it reads the config."""
    configure(folder, num_labels=10**12)
    refused(folder, "num_labels 1e")
    content = Gemma2Config(num_hidden_layers=3).to_dict()
    del content["layer_types"]
    content["num_hidden_layers"] = 10**12
    (folder / "config.json").write_text(json.dumps(content))
    refused(folder, "num_hidden_layers 1e")


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize(
    "changes", [{"hidden_size": 1 << 15, "intermediate_size": 1 << 16}, {"vocab_size": 10**9}]
)
def test_a_config_asks_for_no_more_than_its_files_hold(changes, pickled, folder):
    if pickled:
        as_pickle(folder)
        load_language_model(str(folder))
    configure(folder, **changes)
    refused(folder, "its files? holds?")


def test_an_encoder_asks_for_no_more_either(tower, tmp_path):
    tower().save_pretrained(tmp_path)
    configure(tmp_path, hidden_size=1 << 16, intermediate_size=1 << 16)
    with pytest.raises(CheckpointError, match="its files hold"):
        load_vision(str(tmp_path))


def test_an_index_of_pickles_stays_within_its_folder(folder):
    tensors = load_file(folder / "model.safetensors")
    torch.save(tensors, folder.parent / "outside.bin")
    (folder / "model.safetensors").unlink()
    index = folder / "pytorch_model.bin.index.json"

    def write(name):
        files = dict.fromkeys(tensors, name)
        index.write_text(json.dumps({"metadata": {}, "weight_map": files}))

    write("../outside.bin")
    refused(folder, "is not next to it")
    os.mkfifo(folder / "pipe.bin")
    write("pipe.bin")
    refused(folder, "not a regular file")
    index.write_text('{"weight_map": [1]}')
    refused(folder, "has no weight_map of file names")
    (folder.parent / "outside.bin").rename(folder / "inside.bin")
    write("inside.bin")
    load_language_model(str(folder))


@pytest.mark.parametrize("value", ["someone/kernel", "someone/kernel:entry", {"": "someone/x"}])
def test_no_attention_is_downloaded(value, folder):
    """transformers fetches and runs a kernel that a config names, where `kernels` is installed."""
    configure(folder, attn_implementation=value)
    refused(folder, "code from files is never run")


def test_an_unknown_quantization_does_not_switch_checks_off(folder):
    path = folder / "model.safetensors"
    save_file({**load_file(path), "extra": torch.ones(2)}, path, metadata={"format": "pt"})
    configure(folder, quantization_config={"quant_method": "nobody"})
    refused(folder, "'nobody', which is not known")


def test_a_setting_that_is_no_number(folder):
    configure(folder, rms_norm_eps=float("nan"))
    refused(folder, "rms_norm_eps NaN")
