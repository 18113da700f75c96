r"""What a setting is worth: recipes × overrides × seeds, by the commands `train` and `eval`.

    python -m benchmarks.ablation recipes/miniature-v2.yaml --set steps=300 \
        --vary adapter.placeholder_attention=own,all --seeds 0,1,2 \
        --eval miniature --out runs/ablation/attention.json

Several `--vary` make a grid. `--variant "KEY=VALUE KEY=VALUE"` adds changes that belong together,
`--variant ""` the recipe as it is. A cell is a folder below `runs` next to `--out`, named after
everything that decides its result: run the command again and finished cells are skipped, an
interrupted one goes on from its newest checkpoint.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.measuring import describe
from llama_adapter.files import write_atomically
from llama_adapter.miniature.sources import SOURCES_WITH_MINIATURES
from llama_adapter.training.recipe import load_recipe

COMMAND = (sys.executable, "-m", "llama_adapter.cli")


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One training and its evaluation."""

    recipe: Path
    overrides: tuple[str, ...]
    """Of every cell: they are not part of the variant's name."""
    changes: tuple[str, ...]
    seed: int
    evaluation: tuple[str, ...]
    """Arguments of `llama-adapter eval`, without --model and --out."""

    @property
    def variant(self) -> str:
        """The row of the table that this cell belongs to."""
        return " ".join((self.recipe.stem, *self.changes))

    @property
    def arguments(self) -> tuple[str, ...]:
        """What changes the recipe."""
        return (*self.overrides, *self.changes, f"seed={self.seed}")

    def folder(self, runs: Path) -> Path:
        """Where it is kept: other settings or another evaluation have another folder.

        ConfigError where the recipe refuses the changes.
        """
        recipe = load_recipe(self.recipe, self.arguments, types=SOURCES_WITH_MINIATURES)
        decided_by = recipe.model_dump_json(), self.evaluation
        digest = hashlib.sha256(repr(decided_by).encode()).hexdigest()[:8]
        name = re.sub(r"[^\w.=-]+", "-", self.variant)[:80]
        return runs / f"{name}-{self.seed}-{digest}"

    def run(self, runs: Path) -> dict[str, Any]:
        """Train and evaluate, or read what an earlier run of this cell found."""
        folder = self.folder(runs)
        finished = folder / "cell.json"
        if not finished.is_file():
            out = f"out={json.dumps(str(folder / 'train'))}"
            train = ("train", str(self.recipe), *self.arguments, out)
            trained = _run(*train, "--resume", "--json")
            model = ("--model", trained["adapter"], "--out", str(folder / "eval"))
            score = _run("eval", *self.evaluation, *model, "--json")
            found = {
                "variant": self.variant,
                "seed": self.seed,
                "steps": trained["steps"],
                "checksum": trained["checksum"],
                "metrics": score["metrics"],
            }
            write_atomically(finished, json.dumps(found, indent=2) + "\n")
        return json.loads(finished.read_text())


def _run(*arguments: str) -> dict[str, Any]:
    """The JSON object of a command; its progress goes to our stderr, its failure ends us."""
    print("llama-adapter", shlex.join(arguments), file=sys.stderr)
    done = subprocess.run([*COMMAND, *arguments], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    return json.loads(done.stdout)


def grid(axes: Sequence[str]) -> list[tuple[str, ...]]:
    """Every combination of `KEY=VALUE,VALUE` axes; a comma within brackets parts no values.

    >>> grid(["a=1,2", "b=[x,y]"])
    [('a=1', 'b=[x,y]'), ('a=2', 'b=[x,y]')]
    """
    choices = []
    for axis in axes:
        key, _, values = axis.partition("=")
        choices.append([f"{key}={value}" for value in re.split(r",(?![^\[{]*[\]}])", values)])
    return list(itertools.product(*choices))


def table(cells: Sequence[dict[str, Any]]) -> str:
    """A markdown table: the mean over seeds and, of several, the lowest and the highest."""
    metrics = list(dict.fromkeys(name for cell in cells for name in cell["metrics"]))
    lines = [" | ".join(("| variant", *metrics)) + " |", "|---" * (len(metrics) + 1) + "|"]
    for variant in dict.fromkeys(cell["variant"] for cell in cells):
        rows = [cell["metrics"] for cell in cells if cell["variant"] == variant]
        shown = [_shown([row[name] for row in rows if name in row]) for name in metrics]
        lines.append(" | ".join((f"| {variant}", *shown)) + " |")
    return "\n".join(lines) + "\n"


def _shown(values: Sequence[float]) -> str:
    if not values:
        return "–"
    spread = f" ({min(values):.4g}–{max(values):.4g})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4g}{spread}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipes", nargs="+", type=Path, metavar="RECIPE")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--vary", action="append", default=[], metavar="KEY=VALUE,VALUE")
    parser.add_argument("--variant", action="append", default=[], metavar="KEY=VALUE ...")
    parser.add_argument("--seeds", default="0", help="numbers with commas between them")
    parser.add_argument("--eval", required=True, help="TASK and its options, in one argument")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.json")
    options = parser.parse_args(arguments)
    variants = grid(options.vary) if options.vary or not options.variant else []
    variants += [tuple(shlex.split(variant)) for variant in options.variant]
    runs = options.out.parent / "runs"
    cells = [
        Cell(
            recipe=recipe,
            overrides=tuple(options.overrides),
            changes=changes,
            seed=int(seed),
            evaluation=tuple(shlex.split(options.eval)),
        )
        for seed in options.seeds.split(",")
        for recipe in options.recipes
        for changes in variants
    ]
    for cell in cells:
        cell.folder(runs)  # what a recipe refuses is said before hours of training
    found = [cell.run(runs) for cell in cells]
    options.device = "cuda" if torch.cuda.is_available() else "cpu"
    document = describe("ablation", {"cells": found}, options=options)
    write_atomically(options.out, json.dumps(document, indent=2, default=str) + "\n")
    write_atomically(options.out.with_suffix(".md"), table(found))
    print(table(found), end="")


if __name__ == "__main__":
    main()
