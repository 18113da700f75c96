"""The embeddings of a frozen base keep their size."""

from __future__ import annotations

import pytest
import torch

from llama_adapter.errors import ConfigError


def test_resizing_is_refused_before_anything_changes(build, ids) -> None:
    model = build()
    before = model(ids).logits
    embeddings = model.get_input_embeddings()
    rows = embeddings.weight.shape[0]
    for wanted in ((rows + 8,), (rows - 1,), (None, rows + 1)):
        with pytest.raises(ConfigError, match=f"embeddings of {rows} tokens and is frozen"):
            model.resize_token_embeddings(*wanted)
    assert model.resize_token_embeddings(rows) is embeddings
    assert model.resize_token_embeddings() is embeddings
    assert torch.equal(model(ids).logits, before)
