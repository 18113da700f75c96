"""The scripts of `examples/` as users run them, and the page that tells of them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from PIL import Image
from torch.testing import assert_close

from llama_adapter import LlamaAdapterForConditionalGeneration, LlamaAdapterProcessor

PAGE = Path(__file__).resolve().parents[2] / "docs" / "hugging-face-tools.md"
SAME = {"rtol": 0, "atol": 0}
pytestmark = [
    # transformers tells TRL of a newer name
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated"),
    # what Trainer asks for where there is no accelerator
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true"),
]


def test_hf_trainer_ends_the_same_when_it_is_resumed(run, tmp_path):
    whole = run("hf_trainer.py", "mixed.jsonl", "whole", "--steps", 4, "--save-every", 2)
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    options = ("--steps", 4, "--save-every", 2, "--resume")
    assert_close(run("hf_trainer.py", "mixed.jsonl", "again", *options), whole, **SAME)
    loaded = LlamaAdapterForConditionalGeneration.from_pretrained(tmp_path / "again")
    processor = LlamaAdapterProcessor.from_pretrained(tmp_path / "again")
    assert loaded(**processor("What?")).logits.isfinite().all()


def test_accumulated_batches_in_the_loop_are_one_large_one(run, fresh, capsys):
    for out, options in (("large", ("--batch-size", 6)), ("small", ("--accumulate", 3))):
        run("accelerate_loop.py", "mixed.jsonl", out, "--steps", 2, *options)
    printed = capsys.readouterr().out.splitlines()
    reported = [float(line.split("loss ")[1]) for line in printed if line.startswith("step")]
    assert reported[:2] == pytest.approx(reported[2:], rel=1e-4)
    assert reported[0] == pytest.approx(fresh.loss("mixed.jsonl"), rel=1e-5)
    assert reported[1] < reported[0]


def test_the_page_runs(fresh, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    monkeypatch.setenv("CI", "1")  # TRL reports its use to no one
    talks = fresh.talks("mixed.jsonl")
    group = [fresh.processor(talks, labels=True)]
    names = {"model": fresh.model, "processor": fresh.processor, "talks": talks, "group": group}
    names["image"] = Image.new("RGB", (16, 16), "red")
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    LlamaAdapterForConditionalGeneration.from_pretrained("out")
