"""TRL's SFTTrainer in its four usual ways."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch.testing import assert_close

from llama_adapter import LlamaAdapterForConditionalGeneration

pytest.importorskip("trl", reason="TRL is not installed: pip install 'llama-adapter[trl]'")
SAME = {"rtol": 0, "atol": 0}
pytestmark = [
    # transformers tells TRL of a newer name
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated"),
    # what Trainer asks for where there is no accelerator
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true"),
]


def losses(folder: Path) -> list[float]:
    state = json.loads((folder / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def test_trl_trains_in_four_ways(run, fresh, tmp_path):
    found, trained = {}, {}
    for way in ("messages", "completion", "text", "tokenizer"):
        options = ("--way", way, "--steps", 2, "--batch-size", 6)
        trained[way] = run("trl_sft.py", "seen.jsonl", way, *options)
        found[way] = losses(tmp_path / way / "checkpoint-2")
    # the same tokens are scored as by ourselves: answers, with what ends them
    answers = fresh.loss("seen.jsonl")
    assert found["messages"][0] == pytest.approx(answers, rel=1e-4)
    assert found["completion"] == pytest.approx(found["messages"], rel=1e-4)
    assert found["messages"][1] < found["messages"][0]
    assert found["text"] == found["tokenizer"]
    assert found["text"][0] != pytest.approx(answers, rel=1e-4)
    assert_close(trained["text"], trained["tokenizer"], **SAME)
    seeing = {n for n in trained["text"] if n.startswith("visual.")}
    moved = [n for n in seeing if (trained["messages"][n] != trained["text"][n]).any()]
    assert len(moved) == len(seeing)
    loaded = LlamaAdapterForConditionalGeneration.from_pretrained(tmp_path / "messages")
    assert_close(loaded.adapter.state_dict(), trained["messages"], **SAME)
