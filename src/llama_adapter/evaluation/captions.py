"""Caption metrics as in COCO's server: BLEU-1..4, METEOR, ROUGE-L and CIDEr, times 100.

Each caption is boiled down to sums, so that any subset's corpus score is a function of totals.
BLEU, ROUGE-L and CIDEr are computed here, to the last digit as pycocoevalcap computes them;
tokens and METEOR come from the Java programs that it carries. Where Java is missing, a plain
tokenizer replaces theirs, METEOR is left out and the result is marked as an approximation.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from llama_adapter.config import not_one_of
from llama_adapter.errors import EvaluationError
from llama_adapter.evaluation.java_tools import (
    METEOR_SUMS,
    has_java,
    meteor_score,
    meteor_statistics,
    ptb_tokenize,
)
from llama_adapter.evaluation.records import Floats

_Ngram = tuple[str, ...]
_TINY, _SMALL = 1e-15, 1e-9  # BLEU's guards against division by zero, as in COCO's code
_BETA = 1.2  # weight of recall in ROUGE-L
_SIGMA = 6.0  # width of CIDEr's penalty on length
_BLEU_SUMS = 10


def simple_tokenize(texts: Sequence[str]) -> list[str]:
    """Lower-case words without punctuation; close to PTB's, not equal."""
    return [" ".join(re.findall(r"'(?:s|m|d|re|ve|ll)\b|n't\b|[\w]+", _split(t))) for t in texts]


def _split(text: str) -> str:
    return re.sub(r"(\w)(n't|'(?:s|m|d|re|ve|ll))\b", r"\1 \2", text.lower().replace("-", "_"))


def no_tokenize(texts: Sequence[str]) -> list[str]:
    """Texts that are tokenized already."""
    return [" ".join(text.split()) for text in texts]


TOKENIZERS: dict[str, Callable[[Sequence[str]], list[str]]] = {
    "ptb": ptb_tokenize,
    "simple": simple_tokenize,
    "none": no_tokenize,
}


@dataclass(frozen=True, slots=True)
class CaptionSums:
    """Sums of each caption, and how they were had."""

    sums_UC: Floats
    tokenizer: str
    has_meteor: bool

    @property
    def is_approximate(self) -> bool:
        """Whether the numbers differ from what COCO's server would say."""
        return self.tokenizer == "simple" or not self.has_meteor


def caption_sums(
    candidates: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    tokenizer: str = "auto",
    meteor: bool = True,
) -> CaptionSums:
    """Boil captions down to the sums that `caption_metrics` reads; METEOR's cost most of the time.

    Without `meteor`, or without Java, there are none of its own.
    """
    if tokenizer == "auto":
        tokenizer = "ptb" if has_java() else "simple"
    if tokenizer not in TOKENIZERS:
        raise EvaluationError(not_one_of("tokenizer", tokenizer, ["auto", *TOKENIZERS]))
    tokenize = TOKENIZERS[tokenizer]
    hypotheses = tokenize(candidates)
    flat = iter(tokenize([ref for refs in references for ref in refs]))
    tokenized = [[next(flat) for _ in refs] for refs in references]
    pairs = list(zip(hypotheses, tokenized, strict=True))
    bleu = np.array([_bleu_sums(hyp, refs) for hyp, refs in pairs], dtype=float)
    rouge = np.array([_rouge_l(hyp, refs) for hyp, refs in pairs])
    cider = np.array(_cider(hypotheses, tokenized))
    ones = np.ones(len(pairs))
    columns = [bleu.reshape(-1, _BLEU_SUMS), np.stack([ones, rouge, cider], axis=1)]
    # the plain tokenizer is there for machines without Java: it never starts any
    has_meteor = meteor and tokenizer != "simple" and has_java()
    if has_meteor:
        columns.append(meteor_statistics(hypotheses, tokenized))
    return CaptionSums(np.concatenate(columns, axis=1), tokenizer, has_meteor)


def caption_metrics(totals: Floats) -> dict[str, Floats]:
    """Published names and scales from totals (..., C)."""
    lengths, guessed, correct = totals[..., :2], totals[..., 2:6], totals[..., 6:10]
    shares = (correct + _TINY) / (guessed + _SMALL)
    relative = (lengths[..., 0] + _TINY) / (lengths[..., 1] + _SMALL)
    brevity = np.where(relative < 1, np.exp(np.minimum(0, 1 - 1 / relative)), 1.0)
    metrics = {
        f"BLEU-{n}": 100 * brevity * shares[..., :n].prod(axis=-1) ** (1 / n) for n in range(1, 5)
    }
    count, rouge, cider = np.moveaxis(totals[..., 10:13], -1, 0)
    if totals.shape[-1] == 13 + METEOR_SUMS:
        metrics["METEOR"] = 100 * meteor_score(totals[..., 13:])
    return {**metrics, "ROUGE-L": 100 * rouge / count, "CIDEr": 100 * cider / count}


def _ngrams(text: str) -> Counter[_Ngram]:
    words = text.split()
    return Counter(tuple(words[i : i + n]) for n in range(1, 5) for i in range(len(words) - n + 1))


def _bleu_sums(hypothesis: str, references: Sequence[str]) -> list[int]:
    """Length, closest reference length, guessed n-grams (4), correct n-grams (4)."""
    length = len(hypothesis.split())
    closest = min((abs(len(r.split()) - length), len(r.split())) for r in references)[1]
    most: Counter[_Ngram] = Counter()
    for reference in references:
        most |= _ngrams(reference)
    correct = [0, 0, 0, 0]
    for ngram, count in _ngrams(hypothesis).items():
        correct[len(ngram) - 1] += min(count, most[ngram])
    return [length, closest, *(max(0, length - n) for n in range(4)), *correct]


def _rouge_l(hypothesis: str, references: Sequence[str]) -> float:
    # an empty text counts as one empty word, as in COCO's code
    words = hypothesis.split(" ")
    splits = [reference.split(" ") for reference in references]
    common = [_common_length(words, split) for split in splits]
    precision = max(c / len(words) for c in common)
    recall = max(c / len(s) for c, s in zip(common, splits, strict=True))
    if not precision or not recall:
        return 0.0
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def _common_length(left: Sequence[str], right: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(right) + 1)
    for word in left:
        diagonal = 0
        for i, other in enumerate(right, start=1):
            above = row[i]
            row[i] = diagonal + 1 if word == other else max(above, row[i - 1])
            diagonal = above
    return row[-1]


def _cider(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each caption; rarity is counted over the references at hand."""
    cooked = [[_ngrams(ref) for ref in refs] for refs in references]
    documents: Counter[_Ngram] = Counter()
    for refs in cooked:
        documents.update(set().union(*refs))
    log_images = math.log(len(references)) if references else 0.0

    def vector(counts: Mapping[_Ngram, int]) -> tuple[dict[_Ngram, float], list[float], int]:
        weights = {
            ngram: count * (log_images - math.log(max(1, documents[ngram])))
            for ngram, count in counts.items()
        }
        squares = [0.0] * 4
        for ngram, weight in weights.items():
            squares[len(ngram) - 1] += weight**2
        # COCO's code takes the number of bigrams for the length, and so do we
        length = sum(count for ngram, count in counts.items() if len(ngram) == 2)
        return weights, [math.sqrt(s) for s in squares], length

    scores = []
    for hypothesis, refs in zip(hypotheses, cooked, strict=True):
        weights, norms, length = vector(_ngrams(hypothesis))
        total = 0.0
        for ref in refs:
            ref_weights, ref_norms, ref_length = vector(ref)
            products = [0.0] * 4
            for ngram, weight in weights.items():
                if ngram in ref_weights:
                    other = ref_weights[ngram]
                    products[len(ngram) - 1] += min(weight, other) * other
            penalty = math.exp(-((length - ref_length) ** 2) / (2 * _SIGMA**2))
            pairs = zip(products, norms, ref_norms, strict=True)
            total += penalty * sum(p / (a * b) for p, a, b in pairs if a and b)
        scores.append(10 * total / 4 / len(refs))
    return scores
