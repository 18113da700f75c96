"""Scoring 72,821 judged answers (the size of MSRVTT-QA's test), with intervals.

python -m benchmarks.score
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.measuring import report
from llama_adapter.evaluation.score import score

RECORDS = 72_821


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="also write the JSON there")
    parser.set_defaults(device="cpu")
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 6, RECORDS)
    entries = {
        str(i): [
            {"pred": "yes" if value > 2 else "no", "score": int(value)},
            {"question": "what is shown?", "answer": "dog", "pred": "a dog"},
        ]
        for i, value in enumerate(scores)
    }
    ours = [
        {
            "task": "msrvtt-qa",
            "id": key,
            "questions": ["what is shown?"],
            "gold": "dog",
            "answers": ["a dog"],
            "verdicts": {"answer": verdict},
        }
        for key, (verdict, _) in entries.items()
    ]
    result: dict[str, object] = {"records": RECORDS, "resamples": 1000}
    with tempfile.TemporaryDirectory() as name:
        public, lines = Path(name, "public.json"), Path(name, "predictions.jsonl")
        public.write_text(json.dumps(entries))
        lines.write_text("".join(json.dumps(line) + "\n" for line in ours))
        for kind, path in (("public_format", public), ("predictions_jsonl", lines)):
            started, spent = time.perf_counter(), time.process_time()
            found = score("msrvtt-qa", path)
            # processor time does not count what other processes of a busy machine took
            result[kind] = {
                "wall_s": round(time.perf_counter() - started, 2),
                "cpu_s": round(time.process_time() - spent, 2),
            }
            result["accuracy"] = round(found.metrics["accuracy"], 2)
    report("score", result, targets={}, options=arguments)


if __name__ == "__main__":
    main()
