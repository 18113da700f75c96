"""Published numbers to compare with ours, with where they were published."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """One row of a published table."""

    task: str
    system: str
    metrics: dict[str, float]
    source: str


_ADAPTER = "LLaMA-Adapter"
_V2 = "LLaMA-Adapter V2"
_VIDEO = "as tabulated for LLaMA-Adapter in the video-chat literature (see docs/benchmarks)"
_V2_PAPER = "LLaMA-Adapter V2, arXiv:2304.15010"

PUBLISHED = (
    Published(
        task="msvd-qa",
        system=_ADAPTER,
        metrics={"accuracy": 54.9, "score": 3.1},
        source=_VIDEO,
    ),
    Published(
        task="msrvtt-qa",
        system=_ADAPTER,
        metrics={"accuracy": 43.8, "score": 2.7},
        source=_VIDEO,
    ),
    Published(
        task="activitynet-qa",
        system=_ADAPTER,
        metrics={"accuracy": 34.2, "score": 2.7},
        source=_VIDEO,
    ),
    Published(
        task="videoinstruct",
        system=_ADAPTER,
        metrics={
            "correctness": 2.03,
            "detail": 2.32,
            "context": 2.30,
            "temporal": 1.98,
            "consistency": 2.15,
            "mean": 2.16,
        },
        source=_VIDEO,
    ),
    Published(
        task="infimm-eval",
        system=_V2,
        metrics={"deductive": 28.70, "abductive": 46.12, "analogical": 22.08, "overall": 30.46},
        source="InfiMM-Eval leaderboard, github.com/InfiMM/InfiMM-Eval (commit 5414f97)",
    ),
    Published(
        task="coco-caption",
        system=_V2,
        metrics={"BLEU-4": 36.2, "CIDEr": 122.2},
        source=_V2_PAPER,
    ),
    Published(
        task="scienceqa",
        system="LLaMA-Adapter (V1)",
        metrics={
            "accuracy": 85.19,
            "NAT": 84.37,
            "SOC": 88.30,
            "LAN": 84.36,
            "TXT": 83.72,
            "IMG": 80.32,
            "NO": 86.90,
            "G1-6": 85.83,
            "G7-12": 84.05,
        },
        source="LLaMA-Adapter, arXiv:2303.16199",
    ),
    Published(
        task="scienceqa",
        system="GPT-3 chain of thought",
        metrics={"accuracy": 75.17, "IMG": 67.43},
        source="ScienceQA, github.com/lupantech/ScienceQA",
    ),
    Published(
        task="mme",
        system="LLaMA-Adapter V2.1",
        metrics={"perception": 1326.09, "cognition": 356.43},
        source="LLaMA-Adapter's released V2.1 model, MME",
    ),
    Published(
        task="vicuna-80",
        system=f"{_V2} against ChatGPT",
        metrics={"win_2": 50, "tie": 7, "win_1": 23},
        source=_V2_PAPER,
    ),
)


def published_for(task: str) -> list[Published]:
    """Rows of that task."""
    return [row for row in PUBLISHED if row.task == task]
