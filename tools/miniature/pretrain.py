"""Remake both frozen bases of the miniature world from a seed.

    python -m tools.miniature.pretrain --out DIR [--resume]

Writes `DIR/vision` and `DIR/decoder`, with the recipes of the shipped ones (see their model
cards). About two and a half hours on one CPU core; `--resume` goes on where an earlier run stopped.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from tools.miniature.decoder import pretrain_decoder
from tools.miniature.vision_encoder import VisionTraining, pretrain_vision
from tools.miniature.wiring import PretrainSettings

VISION_STEPS = 4900
VISION_FAIR_FROM = 1250
"""As in the shipped encoder."""


def pretrain_bases(
    out: Path, *, seed: int = 0, resume: bool = False, report: Callable[[str], None] = print
) -> None:
    """Pretrain the vision encoder, then the decoder; neither ever sees the other's data."""
    pretrain_vision(
        out / "vision",
        training=VisionTraining(steps=VISION_STEPS, fair_from=VISION_FAIR_FROM, seed=seed),
        resume=resume,
        report=report,
    )
    pretrain_decoder(
        out / "decoder", settings=PretrainSettings(seed=seed), resume=resume, report=report
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Remake the bases from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.miniature.pretrain",
        description="Remake both frozen bases of the miniature world from a seed.",
    )
    parser.add_argument("--out", type=Path, required=True, help="where the bases go")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads for torch")
    parser.add_argument("--resume", action="store_true", help="go on where DIR stopped")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    report = functools.partial(print, file=sys.stderr, flush=True)
    pretrain_bases(options.out, seed=options.seed, resume=options.resume, report=report)


if __name__ == "__main__":
    main()
