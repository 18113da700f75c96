"""Percentile bootstrap intervals for metrics that are functions of column totals."""

from __future__ import annotations

import numpy as np

from llama_adapter.evaluation.records import Tally

RESAMPLES = 1000
CELLS = 5_000_000
"""Counts held at a time while drawing."""


def bootstrap_intervals(
    tally: Tally, *, resamples: int = RESAMPLES, seed: int = 0, level: float = 0.95
) -> dict[str, tuple[float, float]]:
    """An interval for each metric that has a value, from resampling units with replacement.

    Units with equal sums are interchangeable, so counts of the distinct ones are drawn at once
    from a multinomial: the same distribution, at the price of the distinct units only.
    """
    units = len(tally.sums_UC)
    if units < 2 or resamples < 1:
        return {}
    distinct_KC, multiplicity_K = np.unique(tally.sums_UC, axis=0, return_counts=True)
    rng = np.random.default_rng(seed)
    chunk = max(1, CELLS // len(distinct_KC))
    totals = []
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        counts_BK = rng.multinomial(units, multiplicity_K / units, size=size)
        totals.append(counts_BK @ distinct_KC)
    tail = 100 * (1 - level) / 2
    result = {}
    for name, values_B in tally.metrics(np.concatenate(totals)).items():
        known = values_B[~np.isnan(values_B)]
        if len(known):
            low, high = np.percentile(known, [tail, 100 - tail])
            result[name] = (float(low), float(high))
    return result
