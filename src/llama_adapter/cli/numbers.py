"""Options that are numbers: what each command accepts, checked in one way."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import typer

from llama_adapter.errors import ConfigError

Number = TypeVar("Number", int, float, int | None, float | None)
Check = Callable[[typer.CallbackParam, Number], Number]

MAX_NEW_TOKENS = 1_000_000
MAX_TEMPERATURE = 1e6
MAX_FRAMES = 512
MAX_BEAMS = 1000
MAX_SEED = 2**32 - 1
"""Beyond what torch, numpy and Python all take, a seed would be refused by one of them."""


def between(low: float, high: float) -> Check[Number]:
    """For `typer.Option(callback=…)`: `ConfigError` for values outside, infinite or NaN."""

    def check(parameter: typer.CallbackParam, value: Number) -> Number:
        # every comparison with NaN is false
        if value is not None and not low <= value <= high:
            raise ConfigError(
                f"{parameter.name} must be at least {low:,} and at most {high:,}, got {value}"
            )
        return value

    return check
