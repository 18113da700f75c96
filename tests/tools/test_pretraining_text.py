"""Documents for pretraining hold nothing held out and nothing of an adapter's template."""

from __future__ import annotations

import random
import re
from dataclasses import replace

from tools.miniature.pretraining_text import DISTRACTED, sample_document

from llama_adapter.miniature.captions import NEXT_TEXT
from llama_adapter.miniature.scenes import COLORS, HELD_OUT, SHAPES


def test_no_document_contains_a_held_out_combination():
    rng = random.Random(0)
    for _ in range(300):
        text = " ".join(piece.text for piece in sample_document(rng).pieces)
        for clause in re.split(r"[.,?:]|\band\b", text):
            words = clause.split()
            shapes = [w for w in words if w in SHAPES]
            colors = [w for w in words if w in COLORS]
            assert not {(s, c) for s in shapes for c in colors} & HELD_OUT


def test_the_text_that_counts_comes_last_and_marked():
    rng = random.Random(0)
    alone = replace(DISTRACTED, distracted=0.0, restated=0.0)
    behind = replace(DISTRACTED, distracted=1.0, restated=0.0)
    for _ in range(50):
        document = sample_document(rng, alone)
        assert NEXT_TEXT not in " ".join(piece.text for piece in document.pieces)
        document = sample_document(rng, behind)
        if document.scene is None:
            continue
        other, own, *_ = document.pieces
        assert own.text.startswith(NEXT_TEXT)
        assert (other.segment, own.segment) == (0, 1)
        assert all(one.shape in own.text for one in document.scene.objects)


def test_pretraining_never_shows_the_template_of_instructions():
    rng = random.Random(0)
    for _ in range(300):
        text = " ".join(piece.text for piece in sample_document(rng).pieces)
        assert not {"###", "instruction", "response", "input"} & set(re.findall(r"\w+|###", text))
