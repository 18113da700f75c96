"""From a recipe to a finished run, in one process or as one of several."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator

from llama_adapter.data import SOURCES
from llama_adapter.data.feature_cache import FEATURES
from llama_adapter.errors import TrainingError
from llama_adapter.processing.processor import LlamaAdapterProcessor
from llama_adapter.training.build import Built, build, load_processor
from llama_adapter.training.callbacks import Callbacks, silent
from llama_adapter.training.device import autocast_dtype, require_tracker, wants_cpu
from llama_adapter.training.distributed import (
    ProcessGroup,
    engine_for,
    finish,
    is_sharded,
    start_processes,
)
from llama_adapter.training.features import fill_cache, open_cache
from llama_adapter.training.held_out import CaptionScorer, HeldOutScorer
from llama_adapter.training.metrics import Row
from llama_adapter.training.parallel import Communicator, Engine, on_rank_0
from llama_adapter.training.recipe import CACHE, Recipe, SourceTypes
from llama_adapter.training.run import TrainingResult, TrainingRun
from llama_adapter.training.run_directory import INVALID, TRACKED, RunDirectory, rows_of_steps
from llama_adapter.training.schedule import Clock, StepBudget
from llama_adapter.training.startup import check_positions, refuse_at_start
from llama_adapter.training.streams import RecipeData, open_data


def train(
    recipe: Recipe,
    *,
    resume: bool = False,
    types: SourceTypes = SOURCES,
    callbacks: Callbacks | None = None,
    score_captions: CaptionScorer | None = None,
    clock: Clock = time.perf_counter,
) -> TrainingResult:
    """Train a recipe to its end, from the start or from its newest checkpoint.

    Started by `torchrun` or `accelerate launch`, every process calls this.
    Raises a LlamaAdapterError that says what is wrong with recipe, data, base or directory.
    """
    callbacks = callbacks or Callbacks()
    budget = StepBudget(recipe.streams, steps=recipe.steps, minutes=recipe.minutes, clock=clock)
    if recipe.compute.threads is not None:
        torch.set_num_threads(recipe.compute.threads)
    with ExitStack() as locks, _processes(recipe) as accelerator:
        communicator = ProcessGroup(accelerator.device)
        on_rank_0(communicator, lambda: _acquire_directory(recipe, locks, callbacks, resume=resume))
        # in a frame of its own: what trained is gone when the processes part
        return _train(
            recipe, accelerator, communicator, types, callbacks, score_captions, budget, resume
        )


def _train(
    recipe: Recipe,
    accelerator: Accelerator,
    communicator: Communicator,
    types: SourceTypes,
    callbacks: Callbacks,
    score_captions: CaptionScorer | None,
    budget: StepBudget,
    resume: bool,
) -> TrainingResult:
    processor = load_processor(recipe)
    sizes = refuse_at_start(
        recipe,
        processor,
        score_captions=score_captions,
        world=accelerator.num_processes,
    )
    with accelerator.main_process_first():  # it leaves the samples' lengths for the others
        data = open_data(
            recipe,
            processor,
            types=types,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            pin_memory=accelerator.device.type == "cuda",
            progress=callbacks.progress if accelerator.is_main_process else silent,
        )
    for component in (c for stream in data.streams.values() for c in stream.components):
        longest = int(component.pieces.column("tokens").max(initial=0))
        check_positions(sizes, longest, name=component.source.name)
    with _closing(data):
        sharded = is_sharded(recipe.compute.strategy, accelerator)
        built = build(recipe, device=accelerator.device, on_device=not sharded)
        _cache_features(recipe, built, processor, data, communicator, callbacks)
        engine = engine_for(built.model, accelerator, strategy=recipe.compute.strategy)
        run = TrainingRun(
            recipe,
            built,
            processor=processor,
            streams=data.streams,
            engine=engine,
            callbacks=callbacks,
            evaluate=_evaluation(recipe, built.model, processor, engine, data, score_captions),
            budget=budget,
        )
        on_rank_0(communicator, lambda: _begin(run.directory, recipe, data, callbacks))
        run.track = _tracking(recipe, accelerator)
        if accelerator.is_main_process:
            callbacks.message(_summary(run, engine, accelerator))
        result = run.run(resume=resume)
        return replace(result, invalid=result.invalid + len(data.invalid))


def _acquire_directory(
    recipe: Recipe, locks: ExitStack, callbacks: Callbacks, *, resume: bool
) -> None:
    if not locks.enter_context(RunDirectory(recipe.out).acquire(recipe, resume=resume)):
        callbacks.message(f"{recipe.out} cannot be locked: no other run may write there")


def _begin(directory: RunDirectory, recipe: Recipe, data: RecipeData, callbacks: Callbacks) -> None:
    directory.begin(recipe)
    _list_broken(recipe, data, callbacks)


@contextmanager
def _processes(recipe: Recipe) -> Iterator[Accelerator]:
    tracker = recipe.logging.tracker
    require_tracker(recipe)
    accelerator = start_processes(
        cpu=wants_cpu(recipe),
        trackers=() if tracker == "none" else (tracker,),
        log_dir=str(recipe.out),
    )
    yield accelerator
    # after an error nobody waits: the launcher ends the others
    finish(accelerator)


def _cache_features(
    recipe: Recipe,
    built: Built,
    processor: LlamaAdapterProcessor,
    data: RecipeData,
    communicator: Communicator,
    callbacks: Callbacks,
) -> None:
    """Compute the features of all images, where the recipe wants them on disk."""
    section = recipe.vision
    if section is None or not section.cache_features:
        return
    folder = section.cache_folder or recipe.out / CACHE / FEATURES
    cache = open_cache(section, built.model, processor, folder=folder)
    fill_cache(
        cache,
        data.sources,
        built.model,
        processor,
        communicator=communicator,
        workers=recipe.data.workers,
        progress=callbacks.progress if communicator.rank == 0 else silent,
    )
    data.use_features(cache)


@contextmanager
def _closing(data: RecipeData) -> Iterator[None]:
    try:
        yield
    finally:
        for stream in data.streams.values():
            stream.close()


def _evaluation(
    recipe: Recipe,
    model: Any,
    processor: Any,
    engine: Engine,
    data: RecipeData,
    score_captions: CaptionScorer | None,
) -> HeldOutScorer | None:
    if recipe.evaluation is None:
        return None
    return HeldOutScorer(
        section=recipe.evaluation,
        autocast_dtype=autocast_dtype(recipe.compute, model.device),
        model=model,
        processor=processor,
        engine=engine,
        held_out=data.held_out,
        encoders=data.encoders,
        score_captions=score_captions,
    )


def _tracking(recipe: Recipe, accelerator: Accelerator) -> Any:
    """What hands a row to the recipe's tracker; None without one."""
    if recipe.logging.tracker == "none":
        return None
    settings = dict(flat(recipe.model_dump(mode="json")))
    try:
        accelerator.init_trackers(TRACKED, config=settings)
    except Exception as error:  # without an account, a network, a disk: each has errors of its own
        raise TrainingError(f"logging.tracker {recipe.logging.tracker!r}: {error}") from error

    def track(row: Row, step: int) -> None:
        accelerator.log({k: v for k, v in row.items() if isinstance(v, int | float)}, step=step)

    return track


def flat(values: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Settings one by one, called as overrides call them; those that are None are left out."""
    if isinstance(values, dict | list):
        inner = values.items() if isinstance(values, dict) else enumerate(values)
        for name, value in inner:
            yield from flat(value, f"{key}.{name}" if key else str(name))
    elif values is not None:
        yield key, values


def _list_broken(recipe: Recipe, data: RecipeData, callbacks: Callbacks) -> None:
    """Write down once which records are in no row; those that break later are added there."""
    listed = rows_of_steps(recipe.out / INVALID)
    if data.invalid and not any(listed.rows()):
        for fault in data.invalid:
            listed.append({"step": 0, **fault.to_dict()})
    if data.invalid:
        callbacks.message(
            f"{len(data.invalid)} invalid records are left out, listed in {listed.path}"
        )


def _summary(run: TrainingRun, engine: Engine, accelerator: Accelerator) -> str:
    counts = ", ".join(f"{part} {count:,}" for part, count in run.trained().items())
    where = f"{engine.world_size} process(es) on {accelerator.device.type}"
    return f"{where}, {type(engine).__name__}; trained parameters: {counts}"
