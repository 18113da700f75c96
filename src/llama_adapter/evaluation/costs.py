"""What judging took: tokens from the stored replies, and money where prices are known."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_adapter.errors import EvaluationError
from llama_adapter.evaluation.predictions import JUDGMENTS, number, read_judgments

_MILLION = 1_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Prices:
    """What a judge takes for a million tokens, in whatever currency; both or none."""

    prompt: float | None = None
    completion: float | None = None

    def __post_init__(self) -> None:
        given = [price for price in (self.prompt, self.completion) if price is not None]
        if len(given) == 1:
            raise EvaluationError("prices are needed for both: what a judge reads and writes")
        if any(number(price) is None or price < 0 for price in given):
            raise EvaluationError(f"prices must be finite and at least 0, got {given}")

    def cost(self, *, prompt_tokens: float, completion_tokens: float) -> float | None:
        """What so many tokens cost; None where no prices are known."""
        if self.prompt is None or self.completion is None:
            return None
        return (prompt_tokens * self.prompt + completion_tokens * self.completion) / _MILLION


def judge_usage(folder: Path, *, prices: Prices | None = None) -> dict[str, Any] | None:
    """Tokens of every reply that the judge asked last has given to this run, retries included.

    None where nobody judged, or where words were compared.
    """
    path = folder / JUDGMENTS
    if not path.exists():
        return None
    lines = read_judgments(path)
    judge = lines[-1].get("judge") if lines else None
    replies = (line for line in lines if line.get("reply") is not None and not line.get("again"))
    own = [line for line in replies if line.get("judge") == judge]
    if not own:
        return None
    prices = prices or Prices()
    tokens = {
        name: int(sum(number(line.get(name)) or 0 for line in own))
        for name in ("prompt_tokens", "completion_tokens")
    }
    usage: dict[str, Any] = {"judge": judge, "replies": len(own), **tokens}
    cost = prices.cost(**tokens)
    if cost is not None:
        million = {"prompt": prices.prompt, "completion": prices.completion}
        usage |= {"price_per_million_tokens": million, "cost": round(cost, 6)}
    return usage
