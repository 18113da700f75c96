"""Two processes over gloo: replicas and shards learn what one process learns."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.training.workers import finish, free_port, run_nodes, start, words
from torch.testing import assert_close

from llama_adapter.model.persistence import ADAPTER_WEIGHTS_NAME
from llama_adapter.model.tensor_files import read_tensors
from llama_adapter.training.callbacks import Callbacks
from llama_adapter.training.launch import train
from llama_adapter.training.recipe import load_recipe

pytestmark = pytest.mark.slow
# sums are rounded in another order; without dropout, which every process draws for itself
CLOSE = {"rtol": 0, "atol": 1e-5}


@pytest.fixture
def recipe(recipe_file: Callable[..., Path], still_base: Path) -> Path:
    plain = yaml.safe_load(recipe_file().read_text())
    pairs = {**plain["captions"]["sources"][0], "held_out": 10}
    return recipe_file(
        captions__sources=[pairs],
        evaluation={"every": 2, "samples": 10, "max_new_tokens": 3},
        base__model=str(still_base),
        steps=4,
        checkpoint_every=2,
        captions__accumulation=2,
        compute__gradient_checkpointing=True,
        compute__threads=1,
        lora__rank=2,
        adapter__fusion="late",  # pictures reach all layers, and static prompts with them
    )


class Stop(Exception):
    pass


def stop_at(step: int) -> Callable[[dict[str, Any]], None]:
    def watch(row: dict[str, Any]) -> None:
        if row["step"] == step:
            raise Stop

    return watch


def tensors(run: Path) -> dict[str, Any]:
    lora = read_tensors(run / "adapter" / "lora" / ADAPTER_WEIGHTS_NAME)
    return {**read_tensors(run / "adapter" / ADAPTER_WEIGHTS_NAME), **lora}


@pytest.fixture
def alone(recipe: Path, tmp_path: Path) -> Path:
    out = tmp_path / "alone"
    train(load_recipe(recipe, [f"out={out}"]), score_captions=words)
    return out


def test_two_shards_learn_what_one_process_learns(
    recipe: Path, alone: Path, losses: Any, tmp_path: Path
) -> None:
    out = tmp_path / "shards"
    _, said = finish(*start(recipe, f"out={out}", "compute.strategy=fsdp2", processes=2))
    assert "2 process(es)" in said[0]
    assert "FSDP" in said[0]
    # perplexities are some hundreds
    assert_close(losses(out), losses(alone), rtol=1e-5, atol=1e-5)
    assert "held_out/pairs.words" in losses(out)[-1]
    assert_close(tensors(out), tensors(alone), **CLOSE)


def test_replicas_are_gone_before_their_processes_part(recipe: Path, tmp_path: Path) -> None:
    """Else the last of them can wait for ever; `workers.work` looks for any that is left."""
    _, said = finish(*start(recipe, f"out={tmp_path / 'replicas'}", processes=2))
    assert "2 process(es) on cpu, DDP" in said[0]


def test_a_run_of_one_process_goes_on_in_shards(
    recipe: Path, alone: Path, losses: Any, tmp_path: Path
) -> None:
    """Checkpoints fit any number of processes; a message says what is not exact."""
    out = tmp_path / "moving"
    sharded = [f"out={out}", "compute.strategy=fsdp2"]
    with pytest.raises(Stop):
        train(
            load_recipe(recipe, [f"out={out}"]),
            callbacks=Callbacks(step=stop_at(3)),
            score_captions=words,
        )
    result, said = finish(*start(recipe, *sharded, resume=True, processes=2))
    assert result.started_at == 2
    assert any("not bit for bit" in message for message in said)
    assert_close(losses(out), losses(alone), rtol=1e-5, atol=1e-5)
    assert_close(tensors(out), tensors(alone), **CLOSE)


def test_replicas_on_two_nodes_learn_what_one_process_learns(
    recipe: Path, alone: Path, losses: Any, tmp_path: Path
) -> None:
    """The launch recipe of the guide: the same command on every machine but for the rank."""
    out, port = tmp_path / "nodes", free_port()
    commands = [
        [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1",
         f"--node_rank={rank}", "--master_addr=127.0.0.1", f"--master_port={port}",
         "-m", "llama_adapter.cli", "train", str(recipe), f"out={out}", "evaluation=null"]
        for rank in (0, 1)
    ]  # fmt: skip
    said = run_nodes(commands, tmp_path)
    assert "2 process(es) on cpu, DDP" in said[0]
    unscored = [
        {name: value for name, value in row.items() if not name.startswith("held_out/")}
        for row in losses(alone)
    ]
    assert_close(losses(out), unscored, rtol=0, atol=1e-5)
    assert_close(tensors(out), tensors(alone), **CLOSE)
