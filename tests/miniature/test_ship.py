"""A shipped adapter's training is the same run whether or not it was killed."""

from __future__ import annotations

import pytest
import torch

from llama_adapter.errors import CheckpointError
from llama_adapter.miniature.ship import Shipment, ShipSettings, run


def settings(steps=4):
    return ShipSettings(
        name="v2",
        steps=steps,
        pictures=16,
        checkpoint_every=2,
        test_pictures=8,
        questions=11,
    )


def test_a_killed_run_ends_with_the_same_numbers(tmp_path):
    whole = run(settings(), tmp_path / "whole", resume=False)

    killed = Shipment(settings())
    for _ in range(2):
        killed.school.step()
    (tmp_path / "parts").mkdir()
    killed.save(tmp_path / "parts" / "checkpoint.pt")
    killed.school.step()  # lost with the kill
    killed.school.model.disable_adapters()
    resumed = run(settings(), tmp_path / "parts", resume=True)

    one, other = (s.school.model.adapter.state_dict() for s in (whole, resumed))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert resumed.school.history.rows == whole.school.history.rows
    assert (tmp_path / "parts" / "adapter" / "adapter_model.safetensors").is_file()


def test_another_runs_checkpoint_is_refused(tmp_path):
    one = Shipment(settings())
    one.save(tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError, match="this one is"):
        Shipment(settings(steps=5)).load(tmp_path / "checkpoint.pt")


def test_a_damaged_checkpoint_is_refused(tmp_path):
    path = tmp_path / "checkpoint.pt"
    shipment = Shipment(settings())
    torch.save({"settings": 1}, path)
    for content in (path.read_bytes(), b"", b"PK"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"checkpoint\.pt is"):
            shipment.load(path)
