"""How answers are drawn; without torch, for code that only describes a run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from llama_adapter.errors import ConfigError

_COLDEST = 1e-6
"""Temperatures below take the likeliest token: scores divided by them leave float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationSettings:
    """How answers are drawn."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    """0: the likeliest token every time."""
    top_p: float = 1.0
    beams: int = 1
    """Answers kept under way at once, of which the likeliest is taken (beam search); 1: none."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature must be at least 0 and finite, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.beams < 1:
            raise ConfigError(f"beams must be at least 1, got {self.beams}")
        if self.beams > 1 and self.temperature >= _COLDEST:
            raise ConfigError(
                f"beams {self.beams} need temperature 0, got {self.temperature}: beam search "
                "takes the likeliest answer"
            )

    def as_keywords(self) -> dict[str, Any]:
        """What transformers' `generate` calls them."""
        if self.temperature < _COLDEST:
            greedy = {"max_new_tokens": self.max_new_tokens, "do_sample": False}
            return greedy if self.beams == 1 else greedy | {"num_beams": self.beams}
        return {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": True,
            "temperature": self.temperature,
            "top_p": self.top_p,
        }
