"""The soak benchmark's traffic, a little of it: nothing wrong, nothing stuck, no failure logged."""

from __future__ import annotations

from benchmarks.soak import SHARES, soak


def test_a_soak_finds_nothing(monkeypatch) -> None:
    # few requests would meet none of the rare kinds
    monkeypatch.setitem(SHARES, "adapters", 4.0)
    found = soak(60, clients=8)
    assert found["wrong"] == found["unexpected"] == []
    assert (found["stuck"], found["exit_status"], found["failures_in_the_log"]) == ({}, 0, 0)
    assert set(found["kinds"]) == set(SHARES)
    assert found["greedy_answers_of_generate"] > 20
