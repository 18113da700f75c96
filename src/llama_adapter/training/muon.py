"""Muon, an optimizer for matrices: momentum, made orthogonal (Jordan et al. 2024).

https://kellerjordan.github.io/posts/muon/. `torch.optim.Muon` always multiplies in bfloat16, which
took two fifths of a toy training step on a CPU without instructions for it; here it does so only
where that is fast. It takes the same steps otherwise, reads torch's state, and needs no torch 2.9.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from llama_adapter.training.device import fast_dtype

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration: steepest at 0, since few iterations must do."""
ITERATIONS = 5
EPSILON = 1e-7


class Muon(torch.optim.Optimizer):
    """Moves matrices by their Nesterov momentum, its singular values brought near 1.

    `params` are matrices [out, in], or groups of them with settings of their own; ValueError for
    anything else. `lr` is a square matrix's: taller ones move √(out/in) times as far. Step outside
    autocast.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        *,
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim != 2 or not parameter.is_floating_point():
                    raise ValueError(
                        "Muon moves real matrices, got "
                        f"{parameter.dtype} of shape {list(parameter.shape)}"
                    )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move every matrix that has a gradient; what `closure` returns, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group)
        return loss

    def _move(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        average = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        update = orthogonalized(gradient.lerp(average, group["momentum"]))
        rows, columns = parameter.shape
        rate = group["lr"] * math.sqrt(max(1.0, rows / columns))
        parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)


def orthogonalized(matrix: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """A matrix with the same singular vectors and singular values near 1.

    Between about 0.7 and 1.2, those that were tiny compared with the others below. Computed, and
    returned, in `dtype`; None: bfloat16 where the device is fast at it, else float32.
    """
    dtype = dtype or fast_dtype(matrix.device) or torch.float32
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if is_tall else matrix).to(dtype)
    x = x / x.norm().clamp(min=EPSILON)  # its largest singular value is at most 1
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x
