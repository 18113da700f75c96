"""Run directories with damage anywhere: resumed to the right adapter, or refused in one line."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch
from tests.fuzzing import HOSTILE_VALUES, Campaign, mutated_bytes, mutated_json_text

from llama_adapter.training.launch import train
from llama_adapter.training.plot import plot_run
from llama_adapter.training.recipe import load_recipe
from llama_adapter.training.run import TrainingResult
from llama_adapter.training.run_directory import write_checksums

SAVED = Path(__file__).resolve().parents[1] / "saved/runs"
RUN, CHECKPOINT = Path("joint"), Path("joint/checkpoints/step-00000002")


def resume(out: str = "joint") -> TrainingResult:
    return train(load_recipe(Path("joint.yaml"), [f"out={out}"]), resume=True)


def damage_state(rng: random.Random) -> None:
    """Put an odd value somewhere into the state, whose archive stays valid."""
    state = torch.load(CHECKPOINT / "state.pt", weights_only=True)
    inner = state
    while True:
        key = rng.choice(list(inner))
        if not isinstance(inner[key], dict) or not inner[key] or rng.random() < 0.2:
            break
        inner = inner[key]
    odd = [value for value in HOSTILE_VALUES if not isinstance(value, str) or value.isprintable()]
    inner[key] = rng.choice([*odd, torch.zeros(2), torch.zeros(2, dtype=torch.int64)])
    torch.save(state, CHECKPOINT / "state.pt")


def damage(rng: random.Random) -> bool:
    """Damage one file of the run; whether the damage can make a run of another state."""
    kind = rng.randrange(4)
    if kind == 0:
        damage_state(rng)
        return True
    if kind == 1:  # as of a checkpoint without checksums
        path = CHECKPOINT / "state.pt"
    elif kind == 2:
        write_checksums(CHECKPOINT)
        path = rng.choice(sorted(p for p in CHECKPOINT.rglob("*") if p.is_file()))
    else:
        files = [p for p in RUN.iterdir() if p.is_file()] + list(RUN.glob("best/*"))
        path = rng.choice(sorted(files))
    content = path.read_bytes()
    if path.suffix == ".jsonl" and rng.random() < 0.5:
        row = mutated_json_text({"step": 1, "loss/caption": 2.0, "gate/layers.0": 0.1}, rng)
        path.write_bytes(content + row + b"\n" + content)
    else:
        path.write_bytes(mutated_bytes(content, rng))
    return False


def test_damaged_runs_are_resumed_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(SAVED, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(SAVED / "joint", "intact")
    end = resume("intact").checksum  # rounding differs since its first half was computed
    for rng in (campaign := Campaign("run directories", inputs=4)):
        shutil.rmtree(RUN)
        shutil.copytree(SAVED / "joint", RUN)
        is_other = damage(rng)
        if rng.random() < 0.5:
            campaign.attempt(lambda: plot_run(RUN, Path("drawn")))

        def right(result: TrainingResult, is_other: bool = is_other) -> None:
            assert is_other or result.checksum == end

        campaign.attempt(resume, accepted=right)
        assert not list(tmp_path.rglob("*.partial*"))
