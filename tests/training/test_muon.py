"""Muon gives torch's numbers, in whatever precision the machine is fast at."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from llama_adapter.training import muon
from llama_adapter.training.device import fast_dtype
from llama_adapter.training.muon import Muon, orthogonalized

SHAPES = [(6, 6), (12, 5), (5, 12)]


def matrices(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def trained(kind: type[torch.optim.Optimizer], steps: int = 4) -> list[nn.Parameter]:
    parameters = [nn.Parameter(x) for x in matrices(0)]
    optimizer = kind(parameters, lr=0.1, momentum=0.95, weight_decay=0.1)
    for step in range(steps):
        for parameter, gradient in zip(parameters, matrices(1 + step), strict=True):
            parameter.grad = gradient
        optimizer.step()
    return parameters


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 0.0), (torch.float32, 0.02)], ids=str
)
@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has its own from 2.9 on")
def test_moves_as_torchs_own(
    dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(muon, "fast_dtype", lambda _device: dtype)
    for ours, theirs in zip(trained(Muon), trained(torch.optim.Muon), strict=True):
        assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_singular_vectors_stay_and_values_come_near_one(shape: tuple[int, int]) -> None:
    left, _, right = torch.linalg.svd(matrices(3)[SHAPES.index(shape)], full_matrices=False)
    x = left * torch.linspace(0.3, 2, min(shape)) @ right
    found = orthogonalized(x, dtype=torch.float32)
    assert found.shape == x.shape
    assert found.dtype == torch.float32
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.6
    assert values.max() < 1.25
    turned = left.T @ found @ right.T
    assert_close(turned, turned.diag().diag(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("fast", [None, torch.bfloat16])
def test_multiplies_in_what_the_machine_is_fast_at(
    fast: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(muon, "fast_dtype", lambda _device: fast)
    assert orthogonalized(matrices(0)[0]).dtype == (fast or torch.float32)


def test_a_cpu_is_fast_at_bfloat16_if_it_has_instructions_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for found, dtype in (
        ({}, None),
        ({"avx512_bf16": False, "amx_bf16": False, "avx2": True}, None),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found)
        assert fast_dtype.__wrapped__(torch.device("cpu")) is dtype


def test_what_has_no_gradient_stays_and_the_closure_is_called() -> None:
    still, moving = (nn.Parameter(x) for x in matrices(0)[:2])
    before = still.detach().clone()
    optimizer = Muon([still, moving], lr=0.1)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = moving.square().sum()
        value.backward()
        return value

    first = optimizer.step(loss)
    assert optimizer.step(loss) < first
    assert torch.equal(still, before)


def test_refuses_what_is_no_matrix() -> None:
    with pytest.raises(ValueError, match=r"real matrices, got torch\.float32 of shape \[3\]"):
        Muon([nn.Parameter(torch.zeros(3))])
    with pytest.raises(ValueError, match=r"got torch\.complex64"):
        Muon([nn.Parameter(torch.zeros(3, 3, dtype=torch.complex64))])
