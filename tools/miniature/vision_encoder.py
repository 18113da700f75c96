"""The frozen vision encoder of the miniature world, and how it was pretrained.

A stock `SiglipVisionModel` (64 by 64 pixels, patches of 8) learns from images and
phrases alone; no decoder is in sight. As in SigLIP every image meets every phrase of
the batch, and a sigmoid says whether the phrase ("small red star") is true of it. Two
things make the patches carry whole things instead of a bag of attributes:

- an image's score is that of its best *single* patch, and half of the phrases are
  false by one word only, often a word that is true of another thing in the image;
- phrases also meet the patches that a thing covers, and the empty ones.

Images of test scenes, or phrases about them, occur nowhere (see `phrases`).

    python -m tools.miniature.vision_encoder --out DIR --steps 2200 --seed 0 --resume
"""

from __future__ import annotations

import argparse
import functools
import math
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import SiglipImageProcessorPil, SiglipVisionConfig, SiglipVisionModel

from llama_adapter.errors import TrainingError
from llama_adapter.miniature.bundled import VISION
from llama_adapter.miniature.rendering import render
from llama_adapter.miniature.scenes import MAX_OBJECTS, Scene, Split, sample_scene
from llama_adapter.model.references import resolve_reference
from llama_adapter.pretrained import load_pretrained
from llama_adapter.training.muon import Muon
from tools.miniature.phrases import (
    ATTRIBUTES,
    IMAGE_SIZE,
    PATCH_SIZE,
    PATCHES_PER_SIDE,
    PhraseScorer,
    multi_hot,
    sample_batch,
    to_pixels,
    vision_loss,
)

# Shapes: P patches, N phrases, W words, D width.

BUNDLED_ENCODER = Path(resolve_reference(VISION))


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionTraining:
    """How the encoder is pretrained."""

    steps: int
    """Optimizer steps; the learning rate falls to zero at the last one."""
    seed: int = 0
    """Decides the first weights, every scene, image and phrase."""
    batch_size: int = 64
    """Images a step; each is drawn anew and seen once."""
    matrix_lr: float = 0.02
    """Muon's learning rate, for the matrices of the transformer layers."""
    other_lr: float = 2e-3
    """AdamW's learning rate, for everything else."""
    fair_from: int | None = None
    """First step with fair batches (see `sample_batch`); None: never, as in the shipped run."""
    checkpoint_every: int = 250
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise TrainingError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionAccuracy:
    """How often the best phrase is the true one, over the things of test scenes."""

    num_objects: int
    """Things in each of the scenes."""
    scenes: int
    color_given_shape: float
    size_given_shape: float
    place_given_shape: float
    shape_given_place: float

    def __str__(self) -> str:
        return (
            f"{self.num_objects} thing(s): color|shape {self.color_given_shape:.3f} "
            f"size|shape {self.size_given_shape:.3f} place|shape {self.place_given_shape:.3f} "
            f"shape|place {self.shape_given_place:.3f} ({self.scenes} scenes)"
        )


def new_vision_encoder(*, generator: torch.Generator) -> SiglipVisionModel:
    """An untrained encoder; its positions start as waves, so that neighbors look alike."""
    config = SiglipVisionConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        vision_use_head=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        encoder = SiglipVisionModel(config)
    with torch.no_grad():
        encoder.embeddings.position_embedding.weight.copy_(_waves(config.hidden_size))
    return encoder


def image_processor() -> SiglipImageProcessorPil:
    """What turns an image into the encoder's input: 64 by 64, RGB, from -1 to 1."""
    return SiglipImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )


def load_vision_encoder(path: Path = BUNDLED_ENCODER) -> SiglipVisionModel:
    """The encoder in a directory, frozen and in evaluation mode; by default the shipped one."""
    encoder = load_pretrained(SiglipVisionModel, path, what="vision encoder", dtype=torch.float32)
    return encoder.eval().requires_grad_(False)


def pretrain_vision(
    out: Path,
    *,
    training: VisionTraining,
    resume: bool = False,
    stop_at: int | None = None,
    scenes_each: int = 500,
    report: Callable[[str], None] = print,
) -> list[VisionAccuracy]:
    """Pretrain an encoder and save it, with its image processor, in `out`.

    At each checkpoint the encoder and `training.pt` in `out` are replaced by newer ones,
    never by half-written ones. With `resume` a run goes on from there and ends with the
    very weights that it would have had uninterrupted. `stop_at` ends it early, after that
    step.
    Returns the accuracies on `scenes_each` test scenes with one, two and three things.
    """
    out.mkdir(parents=True, exist_ok=True)
    run = _Run(training)
    if resume and (out / "training.pt").exists():
        run.load(out / "training.pt")
        report(f"resumed at step {run.step} of {training.steps}")
    last = min(training.steps, stop_at or training.steps)
    began, first = time.monotonic(), run.step
    average = math.nan
    while run.step < last:
        loss = run.advance()
        average = loss if math.isnan(average) else 0.98 * average + 0.02 * loss
        if run.step % 50 == 0 or run.step == last:
            pace = (time.monotonic() - began) / (run.step - first)
            minutes = pace * (last - run.step) / 60
            report(
                f"step {run.step}/{training.steps} loss {average:.4f} "
                f"{training.batch_size / pace:.0f} images/s, {minutes:.1f} min left"
            )
        if run.step % training.checkpoint_every == 0 and run.step < last:
            run.save(out)
            for accuracy in evaluate(run.encoder, run.scorer, scenes_each=60):
                report(f"  {accuracy}")
    run.save(out)
    accuracies = evaluate(run.encoder, run.scorer, scenes_each=scenes_each)
    for accuracy in accuracies:
        report(f"final {accuracy}")
    return accuracies


def evaluate(
    encoder: SiglipVisionModel, scorer: PhraseScorer, *, scenes_each: int = 500, seed: int = 4242
) -> list[VisionAccuracy]:
    """Measure on test scenes with one, two and three things, the same ones for a seed."""
    rng = random.Random(seed)
    encoder.eval()
    accuracies = []
    for num_objects in range(1, MAX_OBJECTS + 1):
        scenes = [
            sample_scene(rng, split=Split.TEST, num_objects=num_objects) for _ in range(scenes_each)
        ]
        pixels_BCHW = to_pixels([render(scene, rng, size=IMAGE_SIZE) for scene in scenes])
        with torch.no_grad():
            patches_BPD = torch.cat(
                [encoder(pixel_values=part).last_hidden_state for part in pixels_BCHW.split(100)]
            )
            shares = {
                f"{asked}_given_{given}": _share_right(
                    patches_BPD, scorer, scenes, asked=asked, given=given
                )
                for asked, given in (
                    ("color", "shape"),
                    ("size", "shape"),
                    ("place", "shape"),
                    ("shape", "place"),
                )
            }
        accuracies.append(VisionAccuracy(num_objects=num_objects, scenes=scenes_each, **shares))
    return accuracies


_FIXED = ("steps", "seed", "batch_size", "fair_from", "matrix_lr", "other_lr")
"""Settings that a resumed run must share with its beginning."""


class _Run:
    """All that changes during pretraining; every step's data follow from seed and step."""

    def __init__(self, training: VisionTraining) -> None:
        self.training = training
        generator = torch.Generator().manual_seed(training.seed)
        self.encoder = new_vision_encoder(generator=generator)
        self.scorer = PhraseScorer(self.encoder.config.hidden_size, generator=generator)
        self.step = 0
        matrices = [p for p in self.encoder.encoder.parameters() if p.ndim == 2]
        chosen = {id(p) for p in matrices}
        everything = [*self.encoder.parameters(), *self.scorer.parameters()]
        others = [p for p in everything if id(p) not in chosen]
        self.optimizers: tuple[tuple[torch.optim.Optimizer, float], ...] = (
            (Muon(matrices, weight_decay=0.01), training.matrix_lr),
            (
                torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0),
                training.other_lr,
            ),
        )
        self.parameters = everything

    def advance(self) -> float:
        """Take one step and return its loss."""
        rng = random.Random(f"vision/{self.training.seed}/{self.step}")
        fair_from = self.training.fair_from
        fair = fair_from is not None and self.step >= fair_from
        batch = sample_batch(rng, size=self.training.batch_size, fair=fair)
        self.encoder.train()
        loss = vision_loss(self.encoder, self.scorer, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer, peak in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = peak * self._pace()
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        return loss.item()

    def _pace(self) -> float:
        """A short rise, a plateau, and a linear fall over the last two fifths."""
        left = 1 - self.step / self.training.steps
        return min(1.0, (self.step + 1) / 100, left / 0.4)

    def save(self, out: Path) -> None:
        """Write whole files beside the old ones, then put each in place in one move."""
        state = {
            "step": self.step,
            **{name: getattr(self.training, name) for name in _FIXED},
            "tower": self.encoder.state_dict(),
            "scorer": self.scorer.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer, _ in self.optimizers],
        }
        with tempfile.TemporaryDirectory(dir=out) as part:
            self.encoder.save_pretrained(part)
            image_processor().save_pretrained(part)
            torch.save(state, Path(part) / "training.pt")
            for file in sorted(Path(part).iterdir()):
                file.replace(out / file.name)

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        for name in _FIXED:
            if state[name] != getattr(self.training, name):
                raise TrainingError(
                    f"{path} cannot be resumed: {name} was {state[name]}, "
                    f"now {getattr(self.training, name)}"
                )
        self.step = state["step"]
        self.encoder.load_state_dict(state["tower"])
        self.scorer.load_state_dict(state["scorer"])
        for (optimizer, _), saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def _waves(width: int) -> Tensor:
    """Sines and cosines of row and column, half of the width each, (P, D)."""
    places = torch.arange(PATCHES_PER_SIDE) / PATCHES_PER_SIDE
    frequencies = torch.linspace(0.5, PATCHES_PER_SIDE / 2, width // 4)
    angles = math.tau * places[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=-1) * 0.5
    rows = axis[:, None, :].expand(-1, PATCHES_PER_SIDE, -1)
    columns = axis[None, :, :].expand(PATCHES_PER_SIDE, -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)


def _share_right(
    patches_BPD: Tensor, scorer: PhraseScorer, scenes: Sequence[Scene], *, asked: str, given: str
) -> float:
    """Over all things: is the best answer word, beside the given word, the true one?"""
    right = total = 0
    for patches_PD, scene in zip(patches_BPD, scenes, strict=True):
        for one in scene.objects:
            words = ATTRIBUTES[asked]
            phrases = [{given: getattr(one, given), asked: word} for word in words]
            phrases_NW = torch.stack([multi_hot(phrase) for phrase in phrases])
            best = scorer(patches_PD[None], phrases_NW)[0].amax(-1).argmax().item()
            right += words[int(best)] == getattr(one, asked)
            total += 1
    return right / total


def main(arguments: Sequence[str] | None = None) -> None:
    """Pretrain from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.miniature.vision_encoder",
        description="Pretrain the vision encoder of the miniature world.",
    )
    parser.add_argument("--out", type=Path, required=True, help="where the encoder goes")
    parser.add_argument("--steps", type=int, default=2200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--fair-from", type=int, help="first step with fair batches; default never")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads for torch")
    parser.add_argument("--resume", action="store_true", help="go on from DIR/training.pt")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    pretrain_vision(
        options.out,
        training=VisionTraining(
            steps=options.steps,
            seed=options.seed,
            batch_size=options.batch_size,
            fair_from=options.fair_from,
        ),
        resume=options.resume,
        report=functools.partial(print, file=sys.stderr, flush=True),
    )


if __name__ == "__main__":
    main()
