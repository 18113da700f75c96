"""Runs of a recipe in processes of their own, started from a server that has imported torch."""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
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
    """A port nobody listens on, below those the kernel hands out: nobody is given it by chance."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port


def words(captions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """A score of captions that costs nothing."""
    assert len(captions) == len(references)
    return {"words": float(sum(len(caption.split()) for caption in captions))}


def words_then_interrupted(
    captions: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    """The same of a process that is asked to end meanwhile: the second one."""
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return words(captions, references)


def work(
    environment: dict[str, str],
    recipe: str,
    overrides: list[str],
    resume: bool,
    score: Callable[..., dict[str, float]],
    answers: Any,
) -> None:
    """What one process does: its result and what it said, or its error."""
    import torch
    from torch import distributed as dist
    from torch import nn

    from llama_adapter.training.callbacks import Callbacks
    from llama_adapter.training.launch import train
    from llama_adapter.training.recipe import load_recipe

    os.environ.update(environment)
    torch.set_num_threads(1)
    end_group = dist.destroy_process_group

    def end_group_last(*group: Any) -> None:
        """A replica that outlives its group can wait for ever when it goes (seen once)."""
        kept = [
            each for each in gc.get_objects() if type(each) is nn.parallel.DistributedDataParallel
        ]
        assert not kept
        end_group(*group)

    dist.destroy_process_group = end_group_last
    # as in a run that a user starts; data workers of a server would outlive a kill
    multiprocessing.set_start_method("fork", force=True)
    said: list[str] = []
    try:
        settings = load_recipe(Path(recipe), overrides)
        callbacks = Callbacks(message=said.append)
        result = train(settings, resume=resume, callbacks=callbacks, score_captions=score)
    except Exception:
        answers.put(traceback.format_exc())
        raise
    answers.put((result, said))


def start(
    recipe: Path,
    *overrides: str,
    resume: bool = False,
    processes: int = 1,
    score: Callable[..., dict[str, float]] = words,
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
        arguments = (environment, str(recipe), list(overrides), resume, score, answers)
        started.append(server.Process(target=work, args=arguments))
        started[-1].start()
    return started, answers


def finish(started: Sequence[BaseProcess], answers: Any) -> tuple[Any, list[str]]:
    """The result and messages of rank 0; the first error ends all processes."""
    found: list[Any] = []
    until = time.monotonic() + SECONDS
    try:
        while len(found) < len(started):
            with suppress(Empty):
                found.append(answers.get(timeout=1))
                assert not isinstance(found[-1], str), found[-1]
            codes = [process.exitcode for process in started]
            assert not any(codes), f"a process ended without an answer, exit codes {codes}"
            assert time.monotonic() < until, f"no answer, exit codes {codes}"
        for process in started:
            process.join(SECONDS)
            assert process.exitcode == 0
    finally:
        for process in started:
            process.kill()
    return max(found, key=lambda answer: len(answer[1]))


def run_nodes(commands: Sequence[Sequence[str]], folder: Path) -> list[str]:
    """What each command says on stderr; the first that fails ends all of them."""
    logs = [folder / f"node{rank}.log" for rank in range(len(commands))]
    nodes = []
    try:
        for command, log in zip(commands, logs, strict=True):
            with log.open("w") as file:  # a pipe that is not read would block the node
                nodes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file))
        until = time.monotonic() + SECONDS
        while any(node.poll() is None for node in nodes):
            time.sleep(0.1)
            if any(node.poll() for node in nodes) or time.monotonic() > until:
                break
        codes = [node.poll() for node in nodes]
    finally:
        for node in nodes:
            node.terminate()  # torchrun then ends its workers
            node.wait(60)
    said = [log.read_text() for log in logs]
    tails = "\n".join(f"node {rank}: {text[-4000:]}" for rank, text in enumerate(said))
    assert codes == [0] * len(nodes), f"exit codes {codes}\n{tails}"
    return said
