"""Training, checking and plotting from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from llama_adapter.cli.train import score_captions
from llama_adapter.training.directory_lock import locked

TOY = Path("recipes/toy.yaml").resolve()
SMALL = ("captions.rows=1", "instructions.rows=1", "captions.start=0", "captions.row_length=128")
FEW = ("captions.sources.0.count=12", "instructions.sources.0.count=12")
NONE_HELD_OUT = ("captions.sources.0.held_out=0", "instructions.sources.0.held_out=0")


@pytest.fixture
def small(tmp_path):
    """Arguments that make the toy recipe a matter of seconds."""
    out = f"out={tmp_path}/run"
    return (
        TOY,
        *SMALL,
        *FEW,
        *NONE_HELD_OUT,
        "instructions.row_length=128",
        "evaluation=null",
        out,
    )


def test_captions_are_scored_without_what_is_not_shown(monkeypatch):
    """METEOR takes longer than everything else together."""
    pytest.importorskip("pycocoevalcap")
    monkeypatch.setattr("llama_adapter.evaluation.captions.meteor_statistics", pytest.fail)
    assert sorted(score_captions(["a star"], [["a star"]])) == ["bleu4", "cider"]


def test_the_toy_recipe_trains_resumes_and_is_drawn(cli, small, tmp_path):
    done = cli("train", *small, "steps=2", "checkpoint_every=1", "--json")
    assert done.status == 0, done.stderr
    result = json.loads(done.stdout)
    assert set(result) == {"adapter", "checksum", "steps", "started_at", "broken", "trained"}
    assert result["steps"] == 2
    assert "step 2/2" in done.stderr
    assert "tokens/s" in done.stderr

    again = cli("train", *small, "steps=2", "--resume")
    assert again.status == 0, again.stderr
    assert result["checksum"] in again.stdout
    assert f"llama-adapter chat {result['adapter']}" in again.stderr

    refused = cli("train", *small, "steps=3", "--resume")
    assert refused.status == 2
    assert "another recipe: steps was 2 and is now 3" in refused.stderr

    taken = cli("train", *small, "steps=2", "--check")
    assert (taken.status, "nothing prevents training" in taken.stdout) == (2, False)
    assert "holds a run already; go on with --resume" in taken.stderr

    drawn = cli("plot", tmp_path / "run", "--out", tmp_path / "drawn", "--json")
    assert [Path(f).name for f in json.loads(drawn.stdout)["files"]] == ["plot.png", "plot.html"]


def test_a_check_trains_nothing(cli, small, tmp_path):
    done = cli("train", *small, "--check", "--json")
    assert done.status == 0, done.stderr
    report = json.loads(done.stdout)
    assert [source["kind"] for source in report["sources"]] == ["caption", "instruction"]
    assert not (tmp_path / "run").exists()


def test_a_built_in_model_is_trained_further(cli, small, tmp_path, monkeypatch):
    (tmp_path / "toy").mkdir()  # such as one with images, none of them an adapter
    monkeypatch.chdir(tmp_path)
    recipe = yaml.safe_load(TOY.read_text())
    recipe["adapter"] = {"start": "toy"}
    path = tmp_path / "further.yaml"
    path.write_text(yaml.safe_dump(recipe))
    done = cli("train", path, *small[1:], "steps=1", "--json")
    assert done.status == 0, done.stderr
    again = cli("train", path, *small[1:], "steps=1", "--resume", "--json")
    assert json.loads(again.stdout)["checksum"] == json.loads(done.stdout)["checksum"]
    refused = cli("train", TOY, *small[1:], "adapter.start=toy")
    assert refused.status == 2
    assert "start brings its own settings; remove " in refused.stderr
    assert "preset" in refused.stderr


@pytest.mark.parametrize("mode", [(), ("--resume",), ("--check",)])
def test_a_directory_in_use_is_refused(cli, small, tmp_path, mode):
    (tmp_path / "run").mkdir()
    with locked(tmp_path / "run"):
        refused = cli("train", *small, "steps=1", *mode)
    assert refused.status == 2
    assert "run is in use: process" in refused.stderr
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("optimiser.vision_lr=1", "did you mean 'optimizer'"),
        ("captions.sources.0.type=miniature_caption", "did you mean 'miniature_captions'"),
        ("compute.device=tpu", "compute.device must be cpu or cuda, got 'tpu'"),
        ("base.model=/no/such/base", "cannot load the base '/no/such/base': there is no such"),
        ("adapter.visual_layers=7", "visual_layers is 7, but the base has 6 layers"),
    ],
)
def test_refusals_are_one_line(cli, small, change, message):
    done = cli("train", *small, "steps=1", change)
    assert done.status == 2
    assert message in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("mode", [(), ("--check",)])
@pytest.mark.parametrize("target", ["nowhere", "link"])
def test_a_link_to_nothing_is_no_directory_for_a_run(cli, small, tmp_path, target, mode):
    link = tmp_path / "link"
    link.symlink_to(tmp_path / target)
    refused = cli("train", *small, "steps=1", f"out={link}", *mode)
    assert refused.status == 2
    assert refused.stderr.endswith(f"error: cannot write {link}: {link} is not a folder\n")
    assert list(tmp_path.iterdir()) == [link]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("mode", [(), ("--check",)])
def test_a_folder_that_takes_no_folders_holds_no_run(cli, small, mode):
    refused = cli("train", *small, "steps=1", "out=/proc/x/y", *mode)
    assert refused.status == 2
    assert refused.stderr.endswith("error: cannot write /proc/x/y: No such file or directory\n")


def test_no_recipe_and_no_run(cli, tmp_path):
    missing = cli("train", tmp_path / "recipe.yaml")
    assert (missing.status, missing.stderr.count("\n")) == (2, 1)
    assert "No such file" in missing.stderr
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"out": "x", "steps": 1}))
    assert "base: is missing" in cli("train", tmp_path / "recipe.yaml").stderr
    assert "metrics.jsonl" in cli("plot", tmp_path).stderr
