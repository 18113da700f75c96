"""What the machine that trains can do, and what a recipe asks of it: a device, a tracker."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from llama_adapter.errors import ConfigError, MissingDependencyError

if TYPE_CHECKING:
    from llama_adapter.training.recipe import ComputeSection, Recipe

TRACKER_EXTRAS = {"tensorboard": "train", "wandb": "wandb", "trackio": "trackio"}
"""Each tracker, whose package bears its name, and the extra that installs it."""


def wants_cpu(recipe: Recipe) -> bool:
    """Whether to train on the CPU; ConfigError where the recipe's device is not there."""
    device = recipe.compute.device
    if device is None:
        return not torch.cuda.is_available()
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda"):
        raise ConfigError(f"compute.device must be cpu or cuda, got {device!r}")
    if kind == "cpu":
        return True
    if not torch.cuda.is_available():
        raise ConfigError(f"compute.device is {device!r}, but no GPU can be used here")
    count = torch.cuda.device_count()
    if index and not (index.isdecimal() and int(index) < count):
        raise ConfigError(f"compute.device is {device!r}, but this machine has {count} GPU(s)")
    return False


def require_tracker(recipe: Recipe) -> None:
    """MissingDependencyError where the recipe's tracker is not installed."""
    tracker = recipe.logging.tracker
    if tracker != "none" and find_spec(tracker) is None:
        raise MissingDependencyError(
            tracker, extra=TRACKER_EXTRAS[tracker], purpose=f"logging.tracker {tracker!r}"
        )


def require_quantizer(recipe: Recipe) -> None:
    """MissingDependencyError where the recipe's quantization is not installed."""
    quantization = recipe.base.quantization
    if quantization == "none":
        return
    if recipe.base.random_weights:
        raise ConfigError("base.random_weights and base.quantization exclude each other")
    if find_spec("bitsandbytes") is None:
        raise MissingDependencyError(
            "bitsandbytes", extra="quantization", purpose=f"base.quantization {quantization!r}"
        )


def autocast_dtype(section: ComputeSection, device: torch.device) -> torch.dtype | None:
    """In what the base computes on a device; None: in its own dtype."""
    if section.autocast == "auto":
        return fast_dtype(device)
    return torch.bfloat16 if section.autocast == "bfloat16" else None


@cache
def fast_dtype(device: torch.device) -> torch.dtype | None:
    """bfloat16 where the device multiplies it faster than float32, else None.

    On a CPU that takes the instructions for it: without them bfloat16 is slower.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    has_bfloat16 = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return torch.bfloat16 if has_bfloat16 else None
