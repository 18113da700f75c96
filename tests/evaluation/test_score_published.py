"""The scorers reproduce published scores from published outputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llama_adapter.evaluation.captions import caption_metrics, caption_sums
from llama_adapter.evaluation.java_tools import has_java
from llama_adapter.evaluation.score import score
from llama_adapter.evaluation.tasks.base import Inputs

from .conftest import quick

needs_java = pytest.mark.skipif(not has_java(), reason="needs Java and pycocoevalcap")

PUBLISHED = {
    "Bleu_1": "BLEU-1",
    "Bleu_2": "BLEU-2",
    "Bleu_3": "BLEU-3",
    "Bleu_4": "BLEU-4",
    "METEOR": "METEOR",
    "ROUGE_L": "ROUGE-L",
    "CIDEr": "CIDEr",
}


@needs_java
@pytest.mark.slow
def test_magic_on_coco(real: Path) -> None:
    folder = real / "captions" / "coco_karpathy_test"
    expected = json.loads((folder / "expected.json").read_text())["magic"]
    found = quick("coco-caption", folder / "pred_magic.json", folder / "references.json")
    assert (found.n, found.unanswered) == (expected["recomputed"]["n"], 18)
    for theirs, ours in PUBLISHED.items():
        assert round(found.metrics[ours], 2) == expected["recomputed"][theirs]
        assert round(found.metrics[ours], 1) == expected["published"][theirs]
    assert found.protocol == {"tokenizer": "ptb", "approximate": False}


@needs_java
@pytest.mark.parametrize("index", range(3))
def test_micro_cases(real: Path, index: int) -> None:
    case = json.loads((real / "captions" / "micro_cases" / "cases.json").read_text())[index]
    tokenizer = "none" if case["tokenizer"] == "none" else "ptb"
    sums = caption_sums(case["candidates"], case["references"], tokenizer=tokenizer)
    metrics = caption_metrics(sums.sums_UC.sum(axis=0))
    for theirs, ours in PUBLISHED.items():
        assert metrics[ours] / 100 == pytest.approx(
            case["expected"][theirs], abs=0.6 * 10 ** -case["places"]
        )


def test_scienceqa_gpt3_chain_of_thought(real: Path) -> None:
    folder = real / "scienceqa"
    found = quick("scienceqa", folder / "gpt3_cot_QCM-ALE_results.json", folder)
    assert round(found.metrics["accuracy"], 2) == 75.17
    assert round(found.metrics["IMG"], 2) == 67.43
    assert (found.n, found.unanswered, found.unparsed) == (4241, 243, 6)
    assert "NAT" not in found.metrics
    assert any("file's own count" in note for note in found.notes)


def test_vicuna_reviews(real: Path) -> None:
    folder = real / "vicuna80"
    expected = json.loads((folder / "expected.json").read_text())["totals"]
    for name, totals in expected.items():
        found = quick("vicuna-80", folder / "reviews" / name)
        metrics = found.metrics
        assert (metrics["total_1"], metrics["total_2"]) == (totals["total_1"], totals["total_2"])
        wins = [metrics[key] for key in ("win_1", "tie", "win_2")]
        assert wins == totals["win1_tie_win2"]
        assert (found.n, found.unparsed, found.unjudged) == (80, 0, 0)


def test_vicuna_reviews_are_read_without_their_stored_scores(real: Path, tmp_path: Path) -> None:
    for path in sorted((real / "vicuna80" / "reviews").glob("*/*.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        bare = tmp_path / path.name
        bare.write_text(
            "".join(json.dumps({k: v for k, v in x.items() if k != "score"}) + "\n" for x in lines)
        )
        stored, parsed = quick("vicuna-80", path), quick("vicuna-80", bare)
        assert parsed.unparsed <= 1
        if not parsed.unparsed:
            assert parsed.metrics == stored.metrics


def test_mme_template_answered_right_and_wrong(real: Path, tmp_path: Path) -> None:
    for path in (real / "mme" / "template").glob("*.txt"):
        lines = path.read_text().splitlines()
        right = path.stem != "count"
        answered = [
            f"{line}\t{line.split(chr(9))[2] if right else 'Yes, certainly'}" for line in lines
        ]
        (tmp_path / path.name).write_text("\n".join(answered) + "\n")
    found = score("mme", tmp_path, inputs=Inputs(data=real / "mme" / "template"), resamples=50)
    # always yes: half of the questions, none of the images
    assert found.metrics["count"] == 50
    assert found.metrics["perception"] == 9 * 200 + 50
    assert found.metrics["cognition"] == 800
    assert (found.n, found.unanswered, found.unparsed) == (2374, 0, 0)
