"""The ablation: how large it may be, and what is read back of earlier runs."""

from __future__ import annotations

import json

import pytest

from llama_adapter.errors import ConfigError
from llama_adapter.miniature import ablation
from llama_adapter.miniature.ablation import SHOWN, AblationSettings, run_ablation, write_results

TINY = {"steps": 1, "seeds": (0,), "pictures": 8, "test_pictures": 8, "questions": 11}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be from 1 to 1000000, got 0"),
        ({"steps": 10**12}, "steps must be from 1"),
        ({"seeds": ()}, "seeds must be from 1"),
        ({"pictures": -1}, "pictures must be from 1"),
    ],
)
def test_impossible_sizes_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        AblationSettings(**changes)


def test_a_damaged_result_is_measured_again(tmp_path, monkeypatch):
    settings = AblationSettings(**TINY, only=("reference",))
    runs = []

    def run(*_):
        runs.append(1)
        return {name: {"value": 0.5} for name in SHOWN}

    def stage(label, total):
        return lambda done: None

    monkeypatch.setattr(ablation, "_run", run)
    first = run_ablation(settings, tmp_path, stage=stage)
    assert run_ablation(settings, tmp_path, stage=stage) == first
    path = tmp_path / "runs/reference-0.json"
    row = json.loads(path.read_text())
    for number, damaged in enumerate((b"", b"\xff", b"[" * 10**5, json.dumps({**row, "C1": 3}))):
        path.write_bytes(damaged if isinstance(damaged, bytes) else damaged.encode())
        assert run_ablation(settings, tmp_path, stage=stage) == first
        assert len(runs) == 2 + number
    write_results(first, settings, tmp_path)
    assert not list(tmp_path.rglob(".*"))
