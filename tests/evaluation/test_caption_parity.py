"""Caption metrics against pycocoevalcap itself, on random captions with duplicates and matches."""

from __future__ import annotations

import random

import numpy as np
import pytest

from llama_adapter.evaluation.bootstrap import bootstrap_intervals
from llama_adapter.evaluation.captions import caption_metrics, caption_sums
from llama_adapter.evaluation.java_tools import has_java
from llama_adapter.evaluation.records import Tally

needs_java = pytest.mark.skipif(not has_java(), reason="needs Java and pycocoevalcap")

# inflections, synonyms and paraphrases give METEOR something to match beyond the same word
TEXT = (
    "a the dog dogs run runs running on in of and with grass man rides riding horse two red bus "
    "car automobile auto couch sofa big large huge small little quickly 7 café people walking"
)
WORDS = TEXT.split()
Pair = tuple[str, list[str]]


def caption(rng: random.Random) -> str:
    length = rng.choice((0, 1, 1, *range(2, 12)))
    return " ".join(rng.choice(WORDS) for _ in range(length))


def pairs(count: int) -> list[Pair]:
    rng = random.Random(0)
    made: list[Pair] = []
    for _ in range(count):
        references = [caption(rng) for _ in range(rng.randint(1, 5))]
        one = rng.choice(references)
        candidates = [one, " ".join(sorted(one.split())), f"{one} dog".strip(), caption(rng)]
        made.append((rng.choice(candidates), references))
        if rng.random() < 0.1:
            made.append(made[-1])
    return made[:count]


@needs_java
def test_every_metric_equals_pycocoevalcap() -> None:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge

    made = pairs(200)
    sums_UC = caption_sums(*zip(*made, strict=True), tokenizer="none").sums_UC
    meteor = Meteor()
    rng = np.random.default_rng(0)
    # the whole, bootstrap resamples of it, and a single caption
    subsets = [np.arange(200), *(rng.integers(0, 200, 200) for _ in range(3)), np.array([0])]
    for chosen in subsets:
        captions = {n: [made[place][0]] for n, place in enumerate(chosen)}
        references = {n: made[place][1] for n, place in enumerate(chosen)}
        metrics = caption_metrics(sums_UC[chosen].sum(axis=0))
        bleu, _ = Bleu(4).compute_score(references, captions, verbose=0)
        expected = {f"BLEU-{n}": value for n, value in enumerate(bleu, start=1)}
        expected["METEOR"], _ = meteor.compute_score(references, captions)
        expected["ROUGE-L"], _ = Rouge().compute_score(references, captions)
        if chosen is subsets[0]:  # CIDEr's rarity of words is that of the whole
            expected["CIDEr"], _ = Cider().compute_score(references, captions)
        for name, value in expected.items():
            assert metrics[name] == pytest.approx(100 * value, abs=1e-9), name
    # captions that equal a reference, however they are drawn
    equal = [place for place, (text, references) in enumerate(made) if text and text in references]
    tally = Tally(n=len(equal), sums_UC=sums_UC[equal], metrics=caption_metrics)
    assert bootstrap_intervals(tally, resamples=20)["METEOR"] == pytest.approx((100, 100))
    for pipe in (meteor.meteor_p.stdout, meteor.meteor_p.stderr):
        pipe.close()
