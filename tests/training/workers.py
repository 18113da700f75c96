"""Runs of a recipe in processes of their own, started from a server that has imported torch."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from queue import Empty
from typing import Any

SECONDS = 600
"""How long a run may take on a busy machine."""


def context() -> Any:
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["llama_adapter.training.launch"])
    return server


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def words(captions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """A score of captions that costs nothing."""
    assert len(captions) == len(references)
    return {"words": float(sum(len(caption.split()) for caption in captions))}


def work(
    environment: dict[str, str], recipe: str, overrides: list[str], resume: bool, answers: Any
) -> None:
    """What one process does: its outcome and what it said, or its error."""
    import torch

    from llama_adapter.training.launch import train
    from llama_adapter.training.recipe import load_recipe
    from llama_adapter.training.run import Watcher

    os.environ.update(environment)
    torch.set_num_threads(1)
    said: list[str] = []
    try:
        settings = load_recipe(Path(recipe), overrides)
        watcher = Watcher(say=said.append)
        outcome = train(settings, resume=resume, watcher=watcher, score_captions=words)
    except Exception:
        answers.put(traceback.format_exc())
        raise
    answers.put((outcome, said))


def start(
    recipe: Path, *overrides: str, resume: bool = False, processes: int = 1
) -> tuple[list[BaseProcess], Any]:
    """One process for each rank, as torchrun sets them up."""
    server, port = context(), str(free_port())
    answers = server.Queue()
    started = []
    for rank in range(processes):
        environment = {}
        if processes > 1:
            environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": port}
            environment |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
            environment |= {"MASTER_ADDR": "127.0.0.1"}
        arguments = (environment, str(recipe), list(overrides), resume, answers)
        started.append(server.Process(target=work, args=arguments))
        started[-1].start()
    return started, answers


def finish(started: Sequence[BaseProcess], answers: Any) -> tuple[Any, list[str]]:
    """Outcome and messages of rank 0, which alone speaks."""
    try:
        found = [answers.get(timeout=SECONDS) for _ in started]
    except Empty:
        raise AssertionError("a process did not answer") from None
    errors = [answer for answer in found if isinstance(answer, str)]
    assert not errors, errors[0]
    for process in started:
        process.join(SECONDS)
        assert process.exitcode == 0
    return max(found, key=lambda answer: len(answer[1]))
