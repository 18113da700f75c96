"""Run directories that were damaged, or that a failed start left: right, or refused in one line."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_adapter.errors import CheckpointError, ConfigError, DataError, TrainingError
from llama_adapter.model.persistence import ADAPTER_WEIGHTS_NAME
from llama_adapter.training.callbacks import Callbacks
from llama_adapter.training.launch import train
from llama_adapter.training.plot import plot_run
from llama_adapter.training.recipe import load_recipe
from llama_adapter.training.run import TrainingResult
from llama_adapter.training.run_directory import CHECKSUMS

SAVED = Path(__file__).resolve().parents[1] / "saved/runs"
STATE = Path("joint/checkpoints/step-00000002/state.pt")


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the saved runs as working directory; their checkpoints have no checksums."""
    shutil.copytree(SAVED, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*overrides: str, said: list[str] | None = None, **options: Any) -> TrainingResult:
    say = (lambda _: None) if said is None else said.append
    callbacks = options.pop("callbacks", Callbacks(message=say))
    return train(load_recipe(Path("joint.yaml"), overrides), callbacks=callbacks, **options)


def resumed_undamaged() -> str:
    """How the saved run ends: rounding differs since its first half was computed."""
    shutil.copytree(SAVED / "joint", "intact")
    return run("out=intact", resume=True).checksum


def flip_middle(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["state.pt", f"adapter/{ADAPTER_WEIGHTS_NAME}", CHECKSUMS])
def test_a_damaged_checkpoint_is_left_out_for_the_one_before_it(saved: Path, name: str) -> None:
    whole = run("out=whole")
    run("out=parts", "keep_checkpoints=3")
    steps = [path.name for path in sorted(Path("parts/checkpoints").iterdir())]
    assert steps == ["step-00000002", "step-00000004", "step-00000005"]
    shutil.rmtree("parts/checkpoints/step-00000005")
    flip_middle(Path("parts/checkpoints/step-00000004") / name)
    said: list[str] = []
    resumed = run("out=parts", "keep_checkpoints=3", said=said, resume=True)
    assert any(line.startswith("step-00000004 is left out: ") for line in said)
    assert resumed.started_at == 2
    assert resumed.checksum == whole.checksum
    assert Path("parts/checkpoints/damaged-step-00000004").is_dir()


def test_without_checksums_a_flipped_bit_is_found_too(saved: Path) -> None:
    with zipfile.ZipFile(STATE) as archive:
        member = max(archive.infolist(), key=lambda m: m.file_size * ("/data/" in m.filename))
        values = archive.read(member)
    content = STATE.read_bytes()
    STATE.write_bytes(content.replace(values, bytes((values[0] ^ 1, *values[1:]))))
    with pytest.raises(CheckpointError, match=r"no checkpoint of joint is whole: .*state.pt"):
        run(resume=True)


def _cut(state: dict[str, Any]) -> None:
    moments = state["trainer"]["moments"]
    name = next(iter(moments))
    moments[name]["exp_avg"] = torch.zeros(3)


def _integers(state: dict[str, Any]) -> None:
    kept = next(iter(state["trainer"]["moments"].values()))
    kept["exp_avg"] = kept["exp_avg"].to(torch.int64)


def _endless(state: dict[str, Any]) -> None:
    next(iter(state["trainer"]["moments"].values()))["exp_avg"].fill_(float("nan"))


STATES: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda s: s.pop("trainer"), "trainer: Field required"),
    (lambda s: s.pop("beside"), "extra: Field required"),
    (lambda s: s["trainer"].pop("moments"), "without moments"),
    (lambda s: s["trainer"].update(step_count="2"), "without moments or step_count"),
    (lambda s: s["trainer"].update(step_count=4), "is of step 4, not of step-00000002"),
    (lambda s: s["trainer"]["moments"].update(x={}), "does not have"),
    (lambda s: next(iter(s["trainer"]["moments"].values())).pop("exp_avg"), "is not .'exp_avg'"),
    (_cut, "is of shape .3., expected"),
    (_integers, "is of dtype torch.int64, expected torch.float32"),
    (_endless, "not finite"),
    (lambda s: s["beside"].pop("bad_steps"), "extra.bad_steps: Field required"),
    (lambda s: s["beside"].update(listed=3), "extra.listed"),
    (lambda s: s["beside"]["streams"].pop("caption"), "no position in caption data"),
    (lambda s: s["beside"]["streams"]["caption"].update(epoch=-1), "epoch"),
    (lambda s: s["beside"]["streams"]["caption"].update(broken=[[1]]), "broken"),
]


@pytest.mark.parametrize(("damage", "message"), STATES)
def test_a_state_that_is_not_whole_is_refused(
    saved: Path, damage: Callable[[dict[str, Any]], Any], message: str
) -> None:
    state = torch.load(STATE, weights_only=True)
    damage(state)
    torch.save(state, STATE)
    with pytest.raises(CheckpointError, match=message) as caught:
        run(resume=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"nothing"])
def test_a_state_of_no_bytes_or_other_bytes_is_refused(saved: Path, content: bytes) -> None:
    STATE.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"state.pt is (truncated|damaged)"):
        run(resume=True)


def test_odd_rows_are_left_out_and_counted(saved: Path) -> None:
    end = resumed_undamaged()
    metrics = Path("joint/metrics.jsonl")
    first, *rest = metrics.read_text().splitlines(keepends=True)
    odd = '7\n[1]\n{"step": "1"}\n{"step": true}\n{"loss": 1}\n{"step": -1}\nNaN\n\n'
    odd += "[" * 100_000 + '\n{"step": 1' + "0" * 5000 + "}\n"
    values = '{"step": 1, "loss/x": NaN, "loss/y": "low", "loss/z$": 1, "gate/a": 1e308}\n'
    metrics.write_text(first + odd + values + "".join(rest) + '{"step": 3, "los')
    said: list[str] = []
    plot_run(Path("joint"), Path("drawn"), say=said.append)
    assert said == ["joint/metrics.jsonl: 10 lines are not rows and are left out"]
    resumed = run(said=said, resume=True)
    assert said[-1] == said[0]
    assert resumed.checksum == end
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must hold keys and values"),
        (b"\xff", "is not UTF-8"),
        (b"a: *b", "is not valid YAML"),
        (b"[" * 5000, "nested too deeply"),
        (b"steps: 9\n", "is a run of another recipe"),
    ],
)
def test_a_damaged_stored_recipe_is_one_line(saved: Path, content: bytes, message: str) -> None:
    Path("joint/recipe.yaml").write_bytes(content)
    with pytest.raises(TrainingError, match=message) as caught:
        run(resume=True)
    assert len(str(caught.value)) < 300
    plot_run(Path("joint"))


def test_a_pipe_in_a_run_is_not_waited_for(saved: Path) -> None:
    for name in ("metrics.jsonl", "recipe.yaml"):
        Path("joint", name).unlink()
        os.mkfifo(Path("joint", name))
        with pytest.raises(TrainingError, match="is not a regular file"):
            run(resume=True)
    with pytest.raises(TrainingError, match="is not a regular file"):
        plot_run(Path("joint"))


@pytest.mark.parametrize(
    "damage", [shutil.rmtree, lambda best: (best / ADAPTER_WEIGHTS_NAME).write_bytes(b"x")]
)
def test_a_best_adapter_that_is_damaged_is_made_again(saved: Path, damage: Any) -> None:
    end = resumed_undamaged()
    damage(Path("joint/best"))
    said: list[str] = []
    resumed = run(said=said, resume=True)
    assert any("best adapter so far cannot be kept" in line for line in said)
    assert resumed.checksum == end
    assert Path("joint/best", ADAPTER_WEIGHTS_NAME).stat().st_size > 1000


def test_an_adapter_damaged_after_the_end_is_written_again(saved: Path) -> None:
    whole = run("out=whole")
    flip_middle(whole.adapter / ADAPTER_WEIGHTS_NAME)
    assert run("out=whole", resume=True).checksum == whole.checksum


@pytest.mark.parametrize(
    "wrong",
    [
        "base.model=absent",
        "instructions.sources.0.path=absent.json",
        "adapter.visual_layers=7",
        "instructions.sources.0.held_out=1000",
    ],
)
def test_a_failed_start_leaves_nothing(saved: Path, wrong: str) -> None:
    with pytest.raises((CheckpointError, ConfigError, DataError)):
        run("out=new/run", wrong)
    assert not Path("new").exists()
    run("out=new/run", "steps=1")


def test_a_run_without_a_checkpoint_begins_anew(saved: Path) -> None:
    """Nothing is lost with it, and the recipe that made it end may be corrected."""

    def stop(row: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("out=new", callbacks=Callbacks(step=stop))
    for resume, rate in ((False, 0.5), (True, 0.25)):
        with pytest.raises(KeyboardInterrupt):
            run(
                "out=new",
                f"optimizer.gate_lr={rate}",
                callbacks=Callbacks(step=stop),
                resume=resume,
            )
    assert "gate_lr: 0.25" in Path("new/recipe.yaml").read_text()
    result = run("out=new")
    assert result.checksum == run("out=whole").checksum
    # a folder with a recipe that somebody wrote there is no such run
    Path("mine").mkdir()
    Path("mine/recipe.yaml").write_text("mine")
    with pytest.raises(TrainingError, match="holds a run already"):
        run("out=mine")
    assert Path("mine/recipe.yaml").read_text() == "mine"


@pytest.mark.parametrize("out", ["joint.yaml", "joint.yaml/run", "x" * 5000, "/proc/run"])
def test_a_place_that_cannot_be_written_is_one_line(saved: Path, out: str) -> None:
    with pytest.raises(TrainingError) as caught:
        run(f"out={out}")
    assert "\n" not in str(caught.value)
