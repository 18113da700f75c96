"""Tensor parallel: each rank loads its own heads, and no rank adds what another one adds."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llama_adapter_vllm import attention


@pytest.mark.parametrize("heads", [8, 2])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_hold_their_heads(ranks: int, heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch.randn(heads, 5, 16)
    monkeypatch.setattr(attention, "get_tensor_model_parallel_world_size", lambda: ranks)
    shards = []
    for rank in range(ranks):
        monkeypatch.setattr(attention, "get_tensor_model_parallel_rank", lambda rank=rank: rank)
        parameter = nn.Parameter(torch.zeros(max(1, heads // ranks), 5, 16), requires_grad=False)
        attention.load_heads(parameter, whole)
        shards.append(parameter.data)
    copies = max(1, ranks // heads)  # of each key and value head, on neighboring ranks
    assert torch.equal(torch.cat(shards[::copies]), whole)
    assert torch.equal(torch.cat(shards), whole.repeat_interleave(copies, dim=0))
