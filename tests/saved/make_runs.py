"""How the run directories beside this file were made, once.

    PYTHONPATH=src python tests/saved/make_runs.py tests/saved/runs

They are kept as they are: later code must go on from them and end with the same adapters. Run
again, this writes what the code of the day writes.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from llama_adapter.training.callbacks import Callbacks
from llama_adapter.training.launch import train
from llama_adapter.training.recipe import parse_recipe

WORDS = "<pad> <s> </s> <unk> instruction response say the number a red blue picture 1 2 3 : # ."
STOPS_AFTER = 3


class Stopped(Exception):
    """What ends a run in its middle, as a kill would."""


def make_models() -> None:
    """A base and a vision encoder of the smallest kind, and data, in the working directory."""
    words = WORDS.split()
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words),
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            attention_dropout=0.1,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    ).save_pretrained("base")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained("base")
    SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
        )
    ).save_pretrained("vision")
    SiglipImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained("vision")
    data = Path("data")
    data.mkdir()
    records = [
        {"instruction": f"say the number {n}", "input": "", "output": f"the number {n} ."}
        for n in (1, 2, 3) * 4
    ]
    (data / "alpaca.json").write_text(json.dumps(records))
    for name, color in (("red", (220, 30, 30)), ("blue", (40, 60, 220))):
        Image.new("RGB", (8, 8), color).save(data / f"{name}.png")
    rows = [f"{name}.png\ta {name} picture" for name in ("red", "blue") * 4]
    # a record that no sample can be made of
    (data / "captions.tsv").write_text("url\tcaption\n" + "\n".join([*rows, "none.png\ta"]) + "\n")


def recipes() -> dict[str, dict[str, Any]]:
    """The recipe of each run: every kind of thing that a checkpoint holds is in one of them."""
    shared = {
        "steps": 5,
        "checkpoint_every": 2,
        "keep_checkpoints": 1,
        "base": {"model": "base"},
        "prompt": {"template": "alpaca"},
        "data": {"workers": 0, "max_broken": 0.5, "cache": False},
        "compute": {"device": "cpu"},
        "optimizer": {"warmup_steps": 1, "weight_decay": 0.01, "gate_lr": 0.1},
    }
    alpaca = {"type": "alpaca", "path": "data/alpaca.json"}
    pairs = {"type": "pairs", "path": "data/captions.tsv", "held_out": 1}
    small = {"prompt_length": 2, "visual_prompt_length": 2, "projector": "linear"}
    instructions = {"rows": 2, "row_length": 64, "sources": [alpaca]}
    return {
        "joint": {
            **shared,
            "vision": {"model": "vision"},
            "adapter": {"preset": "v2", **small},
            "captions": {"rows": 2, "row_length": 64, "sources": [pairs]},
            "instructions": instructions,
            "evaluation": {"every": 2, "samples": 1, "best": "pairs.perplexity"},
        },
        "lora": {
            **shared,
            "adapter": {"preset": "v1", "prompt_length": 2},
            "instructions": {**instructions, "accumulation": 2},
            "lora": {"rank": 1, "targets": ["q_proj"]},
        },
    }


def stop(row: dict[str, Any]) -> None:
    """End a run."""
    if row["step"] == STOPS_AFTER:
        raise Stopped


def main(out: Path) -> None:
    """Write models, data, recipes, runs that stopped in their middle, and how those end."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    os.chdir(out)
    torch.set_num_threads(1)
    make_models()
    Path("ends").mkdir()
    for name, values in recipes().items():
        Path(f"{name}.yaml").write_text(yaml.safe_dump({"out": name, **values}, sort_keys=False))
        whole = train(parse_recipe({"out": f"{name}-whole", **values}))
        shutil.copy(whole.adapter / "adapter_model.safetensors", f"ends/{name}.safetensors")
        shutil.rmtree(f"{name}-whole")
        try:
            train(parse_recipe({"out": name, **values}), callbacks=Callbacks(step=stop))
        except Stopped:
            Path(name, ".lock").unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
