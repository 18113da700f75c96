"""Tensor parallel: each rank loads its own heads, and no rank adds what another one adds."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llama_adapter_vllm import attention


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_hold_all_heads_once(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch.randn(8, 5, 16)
    shards = []
    for rank in range(ranks):
        monkeypatch.setattr(attention, "get_tensor_model_parallel_rank", lambda rank=rank: rank)
        parameter = nn.Parameter(torch.zeros(8 // ranks, 5, 16), requires_grad=False)
        attention.load_heads(parameter, whole)
        shards.append(parameter.data)
    assert torch.equal(torch.cat(shards), whole)
