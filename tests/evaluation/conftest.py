from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from llama_adapter.evaluation.score import ScoreReport, score
from llama_adapter.evaluation.tasks.base import Counting, Inputs

REAL = Path(__file__).resolve().parents[3] / "shared" / "real"


@pytest.fixture(scope="session")
def real() -> Path:
    """Published data files that are next to the repository and never in it."""
    if not REAL.is_dir():
        pytest.skip("needs the published data files in ../shared/real")
    return REAL


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, Any], Path]:
    """Writes JSON, JSON lines (a list for a .jsonl name) or text."""

    def write_file(name: str, content: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            path.write_text(content)
        elif name.endswith(".jsonl"):
            path.write_text("".join(json.dumps(line) + "\n" for line in content))
        else:
            path.write_text(json.dumps(content))
        return path

    return write_file


def quick(
    task: str, predictions: Path, data: Path | None = None, *, tokenizer: str = "auto"
) -> ScoreReport:
    """A score without intervals."""
    return score(
        task,
        predictions,
        inputs=None if data is None else Inputs(data=data),
        counting=Counting(tokenizer=tokenizer),
        resamples=0,
    )


def ours(task: str, answers: Sequence[tuple[str, str]], **metadata: Any) -> list[dict[str, Any]]:
    """Lines of a predictions.jsonl."""
    return [
        {
            "task": task,
            "id": id_,
            "questions": ["what?"],
            "gold": "x",
            "answers": [answer],
            "facts": metadata,
        }
        for id_, answer in answers
    ]
