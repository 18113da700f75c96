"""What a step measured, as one flat row of numbers."""

from __future__ import annotations

import math
from typing import Any

from llama_adapter.model.gated_attention import GatedPrompt
from llama_adapter.training.joint import JointTrainer, StepReport

Row = dict[str, Any]
"""A line of metrics.jsonl: `step`, `loss/caption`, `lr/vision`, `gate/layers.3.attention`, …"""


def row_of(report: StepReport, *, step: int) -> Row:
    """The row of one step; a number that is not finite is null."""
    row: Row = {"step": step}
    row |= {f"loss/{kind}": _finite(loss) for kind, loss in report.losses.items()}
    row |= {f"answer_tokens/{kind}": count for kind, count in report.answer_tokens.items()}
    row |= {f"grad_norm/{group}": _finite(norm) for group, norm in report.grad_norms.items()}
    row |= {f"lr/{group}": rate for group, rate in report.lr.items()}
    if report.skipped:
        row["skipped"] = ", ".join(report.not_finite())
    return row


def gate_sizes(trainer: JointTrainer) -> Row:
    """How far each layer's gates are open: the mean over heads of the gate's magnitude.

    All processes must ask together.
    """
    sizes: Row = {}
    is_tanh = trainer.model.adapter_config.gate == "tanh"
    gates = {
        f"{name}.{module.tensors['gate'][0]}"
        for name, module in trainer.model.adapter.modules()
        if isinstance(module, GatedPrompt)
    }
    for named in trainer.named.values():
        for name, parameter in named.items():
            if name in gates:
                gate = trainer.engine.full_tensor(parameter.detach()).float()
                size = (gate.tanh() if is_tanh else gate).abs().mean()
                sizes[f"gate/{name.removesuffix('.gate')}"] = _finite(float(size))
    return sizes


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
