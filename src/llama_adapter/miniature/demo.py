"""The demonstration: what the bundled adapters can do, then a fresh one trained by their recipe.

Both are measured on the same held-out scenes by the evaluation task `miniature`.
"""

from __future__ import annotations

import json
import shutil
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llama_adapter.errors import CheckpointError
from llama_adapter.files import move_directory, write_atomically
from llama_adapter.miniature.bundled import RECIPES, load_bundled
from llama_adapter.miniature.report import gallery, write_report
from llama_adapter.miniature.sources import SOURCES_WITH_MINIATURES
from llama_adapter.miniature.task import (
    HeldOutScenes,
    Results,
    bundled_expert_captions,
    evaluate,
    num_answers,
)
from llama_adapter.model import Group, LlamaAdapterForConditionalGeneration
from llama_adapter.photos.gallery import Gallery
from llama_adapter.processing.processor import LlamaAdapterProcessor
from llama_adapter.training.callbacks import Callbacks, Progress
from llama_adapter.training.launch import train
from llama_adapter.training.plot import plot_run
from llama_adapter.training.recipe import Recipe, load_recipe

TRAINING = "training"
"""The run directory of the training, within the demonstration's own."""
ADAPTER = "adapter"
REPORT = "report.html"
RESULTS = "results.json"
MARK = ".demo"
"""A file by which the next demonstration knows that it may replace what is there."""


def claim(out: Path) -> None:
    """Make the directory a demonstration's own.

    CheckpointError where it cannot be written, or holds an adapter or a training that no
    demonstration made.
    """
    found = [name for name in (TRAINING, ADAPTER) if (out / name).exists()]
    is_ours = (out / MARK).exists() or ((out / REPORT).exists() and (out / RESULTS).exists())
    if found and not is_ours:
        raise CheckpointError(
            f"{out} holds {' and '.join(found)} that no demonstration made, and one would replace "
            "them; choose another --out"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / MARK).touch()
    except OSError as fault:
        raise CheckpointError(f"cannot write into {out}: {fault.strerror or fault}") from fault


def demo_recipe(out: Path, *, minutes: float, seed: int) -> Recipe:
    """The bundled adapter's recipe, for minutes instead of an hour."""
    overrides = (
        f"out={json.dumps(str(out / TRAINING))}",
        f"minutes={minutes}",
        f"seed={seed}",
        "steps=null",
        # of fewer steps LANGUAGE needs a larger share
        "captions.start=0.25",
        "optimizer.language_anneal.until=0.25",
        # what is drawn and measured before the first step costs training time
        f"captions.sources.0.seed={seed}",
        "captions.sources.0.count=12000",
        "captions.sources.0.images=6000",
        f"instructions.sources.0.seed={seed}",
        "instructions.sources.0.count=6000",
    )
    path = RECIPES / "miniature-v2.yaml"
    return load_recipe(path, overrides, types=SOURCES_WITH_MINIATURES)


def run_demo(
    out: Path, recipe: Recipe, test: HeldOutScenes, *, photographs: Gallery, stage: Progress
) -> dict[str, Any]:
    """Measure the bundled adapters, train a fresh one, measure it too, and write it all to `out`.

    `report.html`, `results.json`, the adapter, and the run's directory; what an earlier
    demonstration left there is replaced, its adapter by the new one. Returns the content of
    `results.json`. CheckpointError as of `claim`.
    """
    started = time.perf_counter()
    claim(out)
    shutil.rmtree(out / TRAINING, ignore_errors=True)
    expert = bundled_expert_captions(test, progress=stage("the caption expert", len(test.images)))

    def measured(
        label: str, model: LlamaAdapterForConditionalGeneration, processor: LlamaAdapterProcessor
    ) -> Results:
        tick = stage(f"measuring {label}", num_answers(test))
        return evaluate(model, processor, test, expert_captions=expert, progress=tick)

    bundled = measured("the bundled adapter", *load_bundled())
    training_started = time.perf_counter()
    result = train(recipe, types=SOURCES_WITH_MINIATURES, callbacks=_callbacks(recipe, stage))
    training_seconds = time.perf_counter() - training_started
    move_directory(result.adapter, out / ADAPTER)
    model = LlamaAdapterForConditionalGeneration.from_pretrained(out / ADAPTER)
    processor = LlamaAdapterProcessor.from_pretrained(out / ADAPTER)
    trained = measured("the fresh adapter", model, processor)
    captions = {
        "bundled": bundled.captions,
        "caption expert": expert,
        "trained live": trained.captions,
    }
    results = {
        "photographs": photographs.to_dict(),
        "bundled": bundled.to_dict(),
        "trained": trained.to_dict(),
        "seconds": round(time.perf_counter() - started, 1),
        "training_seconds": round(training_seconds, 1),
        "steps": result.steps,
        "trainable": {
            group.value: sum(p.numel() for p in model.group_parameters(group)) for group in Group
        },
        "seed": recipe.seed,
        "versions": {name: version(name) for name in ("llama-adapter", "torch", "transformers")},
    }
    write_atomically(out / RESULTS, json.dumps(results, indent=2) + "\n")
    write_report(
        out / REPORT,
        photographs=photographs,
        results=results,
        curve=plot_run(out / TRAINING)[0],
        gallery=gallery(model, processor, test, captions=captions),
    )
    return results


def show_photographs(out: Path, photographs: Gallery) -> dict[str, Any]:
    """Write `report.html` and `results.json` of the photographs alone."""
    results = {"photographs": photographs.to_dict()}
    claim(out)
    write_atomically(out / RESULTS, json.dumps(results, indent=2) + "\n")
    write_report(out / REPORT, photographs=photographs)
    return results


def _callbacks(recipe: Recipe, stage: Progress) -> Callbacks:
    """A bar of the seconds that the training takes."""
    assert recipe.minutes is not None
    tick = stage("training a fresh adapter (seconds)", round(recipe.minutes * 60))
    began, shown = time.perf_counter(), 0

    def step(_row: Any) -> None:
        nonlocal shown
        now = int(time.perf_counter() - began)
        tick(now - shown)
        shown = now

    return Callbacks(step=step)
