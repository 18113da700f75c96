"""One optimizer step per pair of a caption batch and an instruction batch (V2 §4.2).

The caption loss moves only the VISION group, the instruction loss only LANGUAGE. Which group
a pass may move is set by `requires_grad` for that pass alone; gradients of the idle group stay
None, so that the optimizer cannot move it by momentum or decay either.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llama_adapter.errors import ConfigError, TrainingError
from llama_adapter.model import (
    Group,
    LlamaAdapterForConditionalGeneration,
    scored_positions,
)

Batch = Mapping[str, Tensor]
"""Keyword arguments of the model's forward, `labels` among them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JointSettings:
    """How the two losses move the two groups."""

    steps: int
    """Optimizer steps in all; the learning rate reaches zero at the last one."""
    joint: str = "disjoint"
    """`disjoint`: each loss moves its own group (the paper); `naive`: both move everything."""
    vision_lr: float = 3e-3
    language_lr: float = 3e-3
    gate_lr: float = 2e-2
    """Gates start at zero and hold everything else back until they open."""
    weight_decay: float = 0.0
    """Of projections and prompts; gates, norms, biases and scales are never decayed."""
    warmup_steps: int = 20
    decay_share: float = 0.5
    """Last share of the steps, over which learning rates fall to zero along a cosine."""
    max_grad_norm: float = 1.0
    """Gradients of each group are clipped to this norm."""

    def __post_init__(self) -> None:
        if self.joint not in ("disjoint", "naive"):
            raise ConfigError(f"joint must be 'disjoint' or 'naive', got {self.joint!r}")
        if self.steps < 1:
            raise ConfigError(f"steps must be at least 1, got {self.steps}")

    def rate_factor(self, step: int) -> float:
        """What multiplies every learning rate in a step, counted from 0."""
        warm = min(1.0, (step + 1) / max(1, self.warmup_steps))
        start = self.steps * (1 - self.decay_share)
        if step <= start:
            return warm
        progress = min(1.0, (step - start) / max(1.0, self.steps - start))
        return warm * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(kw_only=True, slots=True)
class StepReport:
    """What one step measured."""

    losses: dict[str, float] = field(default_factory=dict)
    """By the kind of batch: `caption`, `instruction`."""
    grad_norms: dict[str, float] = field(default_factory=dict)
    """Before clipping, by group."""


class JointTrainer:
    """Moves one adapter; a step takes a caption batch, an instruction batch, or both."""

    def __init__(
        self,
        model: LlamaAdapterForConditionalGeneration,
        settings: JointSettings,
        *,
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        if model.adapter.is_prepared:
            raise TrainingError("the model is prepared for inference; call prepare_for_training()")
        self.model = model
        self.settings = settings
        self.autocast_dtype = autocast_dtype
        self.step_count = 0
        self.parameters = {group: model.group_parameters(group) for group in Group}
        self.optimizer = torch.optim.AdamW(
            parameter_groups(model, settings), betas=(0.9, 0.98), eps=1e-8
        )

    def step(self, *, caption: Batch | None = None, instruction: Batch | None = None) -> StepReport:
        """One optimizer step from either or both losses."""
        if caption is None and instruction is None:
            raise TrainingError("a step needs a caption batch, an instruction batch, or both")
        report = StepReport()
        self.model.train()
        for kind, batch, group in (
            ("caption", caption, Group.VISION),
            ("instruction", instruction, Group.LANGUAGE),
        ):
            if batch is not None:
                report.losses[kind] = self._backward(batch, group)
        for group, parameters in self.parameters.items():
            if any(p.grad is not None for p in parameters):
                norm = nn.utils.clip_grad_norm_(parameters, self.settings.max_grad_norm)
                report.grad_norms[group.value] = float(norm)
        factor = self.settings.rate_factor(self.step_count)
        for parameter_group in self.optimizer.param_groups:
            parameter_group["lr"] = parameter_group["base_lr"] * factor
        self.optimizer.step()
        # None, not zero: with a zero gradient AdamW would still move the idle group
        self.optimizer.zero_grad(set_to_none=True)
        self.step_count += 1
        return report

    def _backward(self, batch: Batch, group: Group) -> float:
        moving = set(Group) if self.settings.joint == "naive" else {group}
        device = self.model.device.type
        enabled = self.autocast_dtype is not None
        with self._only(moving), torch.autocast(device, self.autocast_dtype, enabled=enabled):
            loss = self.model(
                **batch, logits_to_keep=scored_positions(batch["labels"]), use_cache=False
            ).loss
            loss.backward()
        return float(loss.detach())

    @contextmanager
    def _only(self, moving: set[Group]) -> Iterator[None]:
        """Let gradients reach these groups only, within a block."""
        for group, parameters in self.parameters.items():
            for parameter in parameters:
                parameter.requires_grad_(group in moving)
        try:
            yield
        finally:
            for parameters in self.parameters.values():
                for parameter in parameters:
                    parameter.requires_grad_(True)

    def state_dict(self) -> dict[str, Any]:
        """What must be kept to go on later, besides the adapter."""
        return {"optimizer": self.optimizer.state_dict(), "step_count": self.step_count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.step_count = int(state["step_count"])


def fast_dtype(device: torch.device) -> torch.dtype | None:
    """bfloat16 where the device multiplies it faster than float32, else None.

    On a CPU that takes the instructions for it: without them bfloat16 is slower.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else None
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    has_bfloat16 = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return torch.bfloat16 if has_bfloat16 else None


def parameter_groups(
    model: LlamaAdapterForConditionalGeneration, settings: JointSettings
) -> list[dict[str, Any]]:
    """Optimizer groups: by Group, gates apart, and no decay where it would pull to nonsense."""
    buckets: dict[tuple[float, float], list[nn.Parameter]] = {}
    rates = {Group.VISION: settings.vision_lr, Group.LANGUAGE: settings.language_lr}
    for group in Group:
        for name, parameter in model.adapter.named_parameters(group):
            last = name.rsplit(".", 1)[-1]
            is_gate = last in ("gate", "visual_gate", "gate_scale")
            rate = settings.gate_lr if is_gate else rates[group]
            decay = settings.weight_decay if parameter.ndim > 1 else 0.0
            buckets.setdefault((rate, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "base_lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in buckets.items()
    ]
