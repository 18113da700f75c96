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

_ROWS: tuple[tuple[str, str, dict[str, float], str], ...] = (
    ("msvd-qa", _ADAPTER, {"accuracy": 54.9, "score": 3.1}, _VIDEO),
    ("msrvtt-qa", _ADAPTER, {"accuracy": 43.8, "score": 2.7}, _VIDEO),
    ("activitynet-qa", _ADAPTER, {"accuracy": 34.2, "score": 2.7}, _VIDEO),
    (
        "videoinstruct", _ADAPTER,
        {"correctness": 2.03, "detail": 2.32, "context": 2.30, "temporal": 1.98,
         "consistency": 2.15, "mean": 2.16},
        _VIDEO,
    ),
    (
        "infimm-eval", _V2,
        {"deductive": 28.70, "abductive": 46.12, "analogical": 22.08, "overall": 30.46},
        "InfiMM-Eval leaderboard, github.com/InfiMM/InfiMM-Eval (commit 5414f97)",
    ),
    ("coco-caption", _V2, {"BLEU-4": 36.2, "CIDEr": 122.2}, _V2_PAPER),
    (
        "scienceqa", "LLaMA-Adapter (V1)",
        {"accuracy": 85.19, "NAT": 84.37, "SOC": 88.30, "LAN": 84.36, "TXT": 83.72,
         "IMG": 80.32, "NO": 86.90, "G1-6": 85.83, "G7-12": 84.05},
        "LLaMA-Adapter, arXiv:2303.16199",
    ),
    (
        "scienceqa", "GPT-3 chain of thought", {"accuracy": 75.17, "IMG": 67.43},
        "ScienceQA, github.com/lupantech/ScienceQA",
    ),
    (
        "mme", "LLaMA-Adapter V2.1", {"perception": 1326.09, "cognition": 356.43},
        "LLaMA-Adapter's released V2.1 model, MME",
    ),
    ("vicuna-80", f"{_V2} against ChatGPT", {"win_2": 50, "tie": 7, "win_1": 23}, _V2_PAPER),
)  # fmt: skip
PUBLISHED = tuple(
    Published(task=task, system=system, metrics=metrics, source=source)
    for task, system, metrics, source in _ROWS
)


def published_for(task: str) -> list[Published]:
    """Rows of that task."""
    return [row for row in PUBLISHED if row.task == task]
