"""Micro-batches on their way to the model: rows in two parts, channels dropped."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.training.test_joint import tiny_model, trainer_of
from torch.testing import assert_close

from llama_adapter.data.packing import by_length
from llama_adapter.model import Group
from llama_adapter.training import micro_batches
from llama_adapter.training.micro_batches import drop_channels, split_by_length, with_features

LENGTHS = [3, 12, 4, 11, 5]


def padded(index: torch.Tensor | None) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 61, (5, 12), generator=generator)
    mask = torch.arange(12) < torch.tensor(LENGTHS)[:, None]
    batch = {
        "input_ids": ids,
        "attention_mask": mask.long(),
        "labels": ids.masked_fill(~mask | (torch.arange(12) < 2), -100),
    }
    if index is not None:
        batch["image_index"] = index
        batch["pixel_values"] = torch.randn(3, 3, 16, 16, generator=generator)
    return batch


PER_TOKEN = torch.tensor([[2], [0], [-1], [1], [2]]).expand(5, 12).contiguous()


@pytest.mark.parametrize("index", [None, torch.tensor([2, 0, -1, 1, 2]), PER_TOKEN])
def test_gradients_of_both_parts_are_those_of_the_whole(
    index: torch.Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(micro_batches, "PASS_IN_TOKENS", 0)
    batch = padded(index)
    parts = split_by_length(batch)
    assert [list(part["input_ids"].shape) for part in parts] == [[3, 5], [2, 12]]
    kind = "instruction" if index is None else "caption"
    states = []
    for given in ([batch], parts):
        model = tiny_model(visual_layers=2)
        with torch.no_grad():
            for trainable in model.adapter.trainables():
                trainable.parameter.add_(0.05)  # open gates
        trainer = trainer_of(model, max_grad_norm=float("inf"))
        report = trainer.step(**{kind: given})
        states.append((report.losses[kind], report.grad_norms))
    assert_close(states[0][0], states[1][0], rtol=1e-6, atol=0)
    assert_close(states[0][1], states[1][1], rtol=1e-5, atol=0)


def test_rows_stay_together_where_two_passes_cost_more() -> None:
    assert len(split_by_length(padded(None))) == 1


def test_channels_are_dropped_for_all_patches_of_an_image() -> None:
    model = tiny_model()
    batch = with_features(padded(torch.tensor([2, 0, -1, 1, 2])), model)
    features = batch["visual_features"]
    torch.manual_seed(3)
    dropped = drop_channels(batch, 0.25)["visual_features"]
    torch.manual_seed(3)
    assert torch.equal(dropped, drop_channels(batch, 0.25)["visual_features"])
    kept = dropped != 0
    assert torch.equal(kept, kept[:, :1].expand_as(kept))
    assert 0.6 < kept.float().mean() < 0.9
    assert torch.equal(dropped[kept], (features / 0.75)[kept])
    assert "visual_features" not in drop_channels(padded(None), 0.25)
    # features in place of pixels are the same pass
    plain = trainer_of(tiny_model()).step(caption=padded(torch.tensor([2, 0, -1, 1, 2])))
    assert trainer_of(model).step(caption=batch).losses == plain.losses
    assert model.group_parameters(Group.VISION)


def test_groups_of_similar_length_meet_the_batches() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 1000, 230)
    order = by_length(rng.permutation(230), tokens, size=8, head=3, rng=rng)
    assert sorted(order.tolist()) == list(range(230))
    spans = [np.ptp(tokens[order[at : at + 8]]) for at in range(3, 219, 8)]
    assert max(spans) < 120
    means = [tokens[order[at : at + 8]].mean() for at in range(3, 219, 8)]
    assert means != sorted(means)
