"""One optimizer step from caption batches and instruction batches (V2 §4.2).

The caption loss moves only the VISION group, the instruction loss only LANGUAGE. Which group
a pass may move is set by `requires_grad` for that pass alone; gradients of the idle group stay
None, so that the optimizer cannot move it by momentum or decay either.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llama_adapter.config import IGNORE_INDEX
from llama_adapter.errors import CheckpointError, ConfigError, TrainingError
from llama_adapter.model import (
    Group,
    LlamaAdapterForConditionalGeneration,
    answer_mask,
)
from llama_adapter.model.groups import Role
from llama_adapter.training.muon import Muon
from llama_adapter.training.parallel import Engine, SingleProcess, dummy_image
from llama_adapter.training.recipe import OptimizerSection
from llama_adapter.training.schedule import language_scale, lr_scale

Batch = Mapping[str, Tensor]
"""Keyword arguments of the model's forward, `labels` among them."""
Batches = Batch | Sequence[Batch]
"""One micro-batch, or those whose gradients are accumulated."""
_ADAMW_STATE, _MUON_STATE = {"step", "exp_avg", "exp_avg_sq"}, {"momentum_buffer"}
_STEP_LIKE = torch.zeros(())
MUON_LR = 0.01
"""Of the projector's matrices where a recipe names none."""
GROUP_OF = {"caption": Group.VISION, "instruction": Group.LANGUAGE}
"""Which group the loss of a kind of batch moves."""


def moved_by(kinds: Iterable[str], section: OptimizerSection) -> set[Group]:
    """The groups that batches of these kinds move: each its own, or all of them where naive."""
    return set(Group) if section.joint == "naive" else {GROUP_OF[kind] for kind in kinds}


@dataclass(kw_only=True, slots=True)
class StepReport:
    """What one step measured, over all processes."""

    losses: dict[str, float] = field(default_factory=dict)
    """By the kind of batch: `caption`, `instruction`."""
    grad_norms: dict[str, float] = field(default_factory=dict)
    """Before clipping, by group."""
    answer_tokens: dict[str, int] = field(default_factory=dict)
    """How many tokens were scored, by the kind of batch."""
    lr: dict[str, float] = field(default_factory=dict)
    """Learning rates, by `vision`, `language`, `gates`."""
    skipped: bool = False
    """Whether nothing moved, because a loss or a gradient was not finite."""

    def not_finite(self) -> list[str]:
        """Which of the losses are not finite, or else which gradients."""
        losses = [f"{kind} loss" for kind, loss in self.losses.items() if not math.isfinite(loss)]
        norms = [f"{g} gradient" for g, norm in self.grad_norms.items() if not math.isfinite(norm)]
        return losses or norms


class JointTrainer:
    """Moves one adapter; a step takes caption batches, instruction batches, or both."""

    def __init__(
        self,
        model: LlamaAdapterForConditionalGeneration,
        optimizer: OptimizerSection,
        *,
        steps: int,
        autocast_dtype: torch.dtype | None = None,
        engine: Engine | None = None,
        lora: Mapping[str, nn.Parameter] | None = None,
        lora_lr: float | None = None,
    ) -> None:
        """`steps` are those in all, which the learning rates follow; it may be changed.

        `lora` are further parameters of the LANGUAGE group by name; `lora_lr` None: LANGUAGE's.
        """
        if model.adapter.is_prepared:
            raise TrainingError("the model is prepared for inference; call prepare_for_training()")
        self.model = model
        self.section = optimizer
        self.steps = steps
        self.autocast_dtype = autocast_dtype
        self.engine: Engine = SingleProcess(model) if engine is None else engine
        self.step_count = 0
        # held here: a sharded model shows other tensors under these names during a pass
        self.named = {group: dict(model.adapter.named_parameters(group)) for group in Group}
        self.named[Group.LANGUAGE].update(lora or {})
        self.parameters = {group: list(named.values()) for group, named in self.named.items()}
        trainables = list(model.adapter.trainables())
        self._gates = frozenset(t.name for t in trainables if t.role is Role.GATE)
        self._matrices = frozenset(t.name for t in trainables if t.is_matrix)
        self.optimizers = self._make_optimizers(dict.fromkeys(lora or (), lora_lr))

    def _make_optimizers(
        self, lrs: Mapping[str, float | None]
    ) -> tuple[torch.optim.Optimizer, ...]:
        """`lrs` are learning rates of single parameters; None: their group's."""
        section = self.section
        lrs = {**lrs, **dict.fromkeys(self._gates, section.gate_lr)}
        if section.projector_optimizer == "adamw":
            lrs |= dict.fromkeys(self._matrices, section.projector_lr)
            return (_adamw(parameter_groups(self.named, section, lrs=lrs)),)
        named = self.named[Group.VISION]
        matrices = {name: p for name, p in named.items() if name in self._matrices}
        rest = {name: p for name, p in named.items() if name not in matrices}
        adamw = _adamw(parameter_groups({**self.named, Group.VISION: rest}, section, lrs=lrs))
        if not matrices:
            return (adamw,)
        if any(hasattr(parameter, "placements") for parameter in matrices.values()):
            raise ConfigError(
                "optimizer.projector_optimizer 'muon' needs whole matrices, and FSDP2 shards them"
            )
        lr = MUON_LR if section.projector_lr is None else section.projector_lr
        group = {"params": list(matrices.values()), "base_lr": lr, "group": Group.VISION}
        return adamw, Muon([group], lr=lr, weight_decay=section.weight_decay)

    def step(
        self, *, caption: Batches | None = None, instruction: Batches | None = None
    ) -> StepReport:
        """One optimizer step from either or both losses; none if a loss is not finite."""
        given = {"caption": _as_list(caption), "instruction": _as_list(instruction)}
        batches = {kind: batch for kind, batch in given.items() if batch}
        if not batches:
            raise TrainingError("a step needs a caption batch, an instruction batch, or both")
        report = StepReport()
        self.model.train()
        counts, has_images = self._agree(batches)
        losses = []
        for (kind, micro_batches), count in zip(batches.items(), counts, strict=True):
            losses.append(self._backward(micro_batches, kind, count, has_images.pop(0)))
            report.answer_tokens[kind] = int(count)
        summed = self.engine.all_reduce(torch.stack(losses)).tolist()
        report.losses = dict(zip(batches, summed, strict=True))
        report.grad_norms = self._clip()
        report.skipped = bool(report.not_finite())
        scales = self._lr_scales()
        report.lr = {
            "vision": self.section.vision_lr * scales[Group.VISION],
            "language": self.section.language_lr * scales[Group.LANGUAGE],
            "gates": self.section.gate_lr * scales[Group.VISION],
        }
        if not report.skipped:
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["base_lr"] * scales[group["group"]]
                optimizer.step()
        for optimizer in self.optimizers:
            # None, not zero: with a zero gradient AdamW would still move the idle group
            optimizer.zero_grad(set_to_none=True)
        self.step_count += 1
        return report

    def _lr_scales(self) -> dict[Group, float]:
        scale = lr_scale(self.section, self.step_count, self.steps)
        language = language_scale(self.section, self.step_count, self.steps)
        return {Group.VISION: scale, Group.LANGUAGE: scale * language}

    def _agree(self, batches: Mapping[str, Sequence[Batch]]) -> tuple[Tensor, list[list[bool]]]:
        """Answer tokens of the whole step by kind, and which micro-batches have images.

        Of all processes together: they must all run the same kind of pass.
        """
        own = [
            torch.stack([(batch["labels"][:, 1:] != IGNORE_INDEX).sum() for batch in of_kind]).sum()
            for of_kind in batches.values()
        ]
        images = [torch.tensor(_has_images(batch)) for kind in batches.values() for batch in kind]
        device = self.model.device
        values = torch.stack([n.to(device, torch.int64) for n in (*own, *images)])
        totals = self.engine.all_reduce(values)
        seen = iter((totals[len(own) :] > 0).tolist())
        return totals[: len(own)].clamp(min=1), [[next(seen) for _ in k] for k in batches.values()]

    def _backward(
        self, batches: Sequence[Batch], kind: str, num_tokens: Tensor, has_images: list[bool]
    ) -> Tensor:
        """Accumulate gradients of one loss; this process's share of it."""
        moving = moved_by([kind], self.section)
        device = self.model.device
        enabled = self.autocast_dtype is not None
        losses = []
        for index, batch in enumerate(batches):
            inputs = {name: t.to(device, non_blocking=True) for name, t in batch.items()}
            # without an image VISION alone would have nothing to differentiate
            needs_image = has_images[index] or moving == {Group.VISION}
            if needs_image and not _has_images(batch):
                inputs |= dummy_image(self.model, inputs["input_ids"])
            with (
                self._only(moving),
                self.engine.sync_gradients(index == len(batches) - 1),
                torch.autocast(device.type, self.autocast_dtype, enabled=enabled),
            ):
                loss = self.engine.module(
                    **inputs,
                    num_answer_tokens=num_tokens,
                    logits_to_keep=answer_mask(inputs["labels"]),
                    use_cache=False,
                ).loss
                # engines average gradients over processes, and the loss is a sum over them
                (loss * self.engine.world_size if self.engine.world_size > 1 else loss).backward()
            losses.append(loss.detach())
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def _clip(self) -> dict[str, float]:
        norms = {}
        for group, parameters in self.parameters.items():
            if any(p.grad is not None for p in parameters):
                norm = nn.utils.clip_grad_norm_(parameters, self.section.max_grad_norm)
                norms[group.value] = float(self.engine.full_tensor(norm))
        return norms

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

    def _all_named(self) -> dict[str, nn.Parameter]:
        return {name: p for named in self.named.values() for name, p in named.items()}

    def parameter_state(self) -> dict[str, Tensor]:
        """Every trained tensor in one piece, by name; all processes must ask together."""
        return {n: self.engine.full_tensor(p.detach()) for n, p in self._all_named().items()}

    @torch.no_grad()
    def load_parameter_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `parameter_state` gave, in however many processes that was.

        CheckpointError where a tensor is missing, unknown, or of another shape or dtype.
        """
        named = self._all_named()
        unknown = sorted(set(state) - set(named))
        if unknown:
            raise CheckpointError(f"tensors {unknown[:3]}, which this adapter does not have")
        for name, parameter in named.items():
            parameter.copy_(self.engine.local_shard(_of_shape(state, name, parameter), parameter))

    def _optimizer_of(self, parameter: nn.Parameter) -> torch.optim.Optimizer:
        last = self.optimizers[-1]
        held = any(parameter is p for group in last.param_groups for p in group["params"])
        return last if held else self.optimizers[0]

    def state_dict(self) -> dict[str, Any]:
        """What must be kept to go on later, in addition to the adapter; full tensors by name."""
        moments = {}
        for name, parameter in self._all_named().items():
            kept = self._optimizer_of(parameter).state.get(parameter)
            if kept:
                moments[name] = {key: self.engine.full_tensor(value) for key, value in kept.items()}
        return {"moments": moments, "step_count": self.step_count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`, in however many processes it was made.

        CheckpointError where it is damaged or of another adapter.
        """
        named = self._all_named()
        moments, step_count = state.get("moments"), state.get("step_count")
        if not isinstance(moments, Mapping) or not isinstance(step_count, int):
            raise CheckpointError("optimizer state without moments or step_count")
        unknown = sorted(map(str, set(moments) - set(named)))
        if unknown:
            raise CheckpointError(
                f"optimizer state of {unknown[:3]}, which this adapter does not have"
            )
        for optimizer in self.optimizers:
            optimizer.state.clear()
        for name, kept in moments.items():
            parameter = named[name]
            optimizer = self._optimizer_of(parameter)
            expected = _MUON_STATE if isinstance(optimizer, Muon) else _ADAMW_STATE
            if not isinstance(kept, Mapping) or set(kept) != expected:
                raise CheckpointError(f"optimizer state of {name} is not {sorted(expected)}")
            optimizer.state[parameter] = {
                key: _checked(kept[key], key, _STEP_LIKE).clone()
                if key == "step"
                else self.engine.local_shard(_of_shape(kept, key, parameter), parameter).clone()
                for key in kept
            }
        self.step_count = step_count


def _as_list(batches: Batches | None) -> list[Batch]:
    if batches is None:
        return []
    return [batches] if isinstance(batches, Mapping) else list(batches)


def _has_images(batch: Batch) -> bool:
    return batch.get("pixel_values") is not None or batch.get("visual_features") is not None


def _of_shape(state: Mapping[str, Tensor], name: str, parameter: Tensor) -> Tensor:
    return _checked(state.get(name), name, parameter)


def _checked(found: Any, name: str, like: Tensor) -> Tensor:
    """A tensor of a checkpoint: finite, and of the expected shape and dtype."""
    if not isinstance(found, Tensor):
        raise CheckpointError(f"tensor {name} is missing, expected {list(like.shape)}")
    for what, is_, expected in (
        ("shape", list(found.shape), list(like.shape)),
        ("dtype", found.dtype, like.dtype),
    ):
        if is_ != expected:
            raise CheckpointError(f"tensor {name} is of {what} {is_}, expected {expected}")
    if not found.isfinite().all():
        raise CheckpointError(f"tensor {name} holds values that are not finite")
    return found


def parameter_groups(
    named: Mapping[Group, Mapping[str, nn.Parameter]],
    section: OptimizerSection,
    *,
    lrs: Mapping[str, float | None],
) -> list[dict[str, Any]]:
    """Optimizer groups by Group, learning rate and decay; `lrs` has those of single parameters.

    Nothing is decayed that decay would pull to nonsense.
    """
    buckets: dict[tuple[Group, float, float], list[nn.Parameter]] = {}
    of_group = {Group.VISION: section.vision_lr, Group.LANGUAGE: section.language_lr}
    for group in Group:
        for name, parameter in named[group].items():
            own = lrs.get(name)
            lr = of_group[group] if own is None else own
            decay = section.weight_decay if parameter.ndim > 1 else 0.0
            buckets.setdefault((group, lr, decay), []).append(parameter)
    return [
        {"params": params, "lr": lr, "base_lr": lr, "weight_decay": decay, "group": group}
        for (group, lr, decay), params in buckets.items()
    ]


def _adamw(groups: list[dict[str, Any]]) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-8)
