"""The task `miniature` marks what greedy decoding would do, and the demonstration is made of it."""

from __future__ import annotations

import json
import random
import re
import shutil

import pytest
from safetensors.torch import load_file, save_file

from llama_adapter.chat import ChatSession
from llama_adapter.errors import EvaluationError
from llama_adapter.generation import GenerationSettings
from llama_adapter.miniature.bundled import bundled_adapter, load_bundled
from llama_adapter.miniature.captions import CAPTION_TASK
from llama_adapter.miniature.demo import claim, demo_recipe, run_demo
from llama_adapter.miniature.scenes import HELD_OUT
from llama_adapter.miniature.task import METRICS, HeldOutScenes, Results, Score, answer_questions
from llama_adapter.photos.gallery import Gallery


@pytest.fixture(scope="module")
def small():
    return HeldOutScenes.draw(images=24, questions=11, seed=99)


def quiet(label, total):
    return lambda count: None


def test_wilson_interval_of_known_cases():
    low, high = Score(right=8, total=10).interval()
    assert low == pytest.approx(0.4902, abs=1e-4)
    assert high == pytest.approx(0.9433, abs=1e-4)
    assert Score(right=0, total=20).interval()[0] == 0.0


def test_every_test_scene_has_a_held_out_combination(small):
    for scene in small.scenes:
        assert any((t.shape, t.color) in HELD_OUT for t in scene.objects)
    assert HeldOutScenes.draw(images=24, questions=11, seed=99).questions == small.questions


def test_a_set_without_questions_is_refused():
    with pytest.raises(EvaluationError, match="2 images and a question at least"):
        HeldOutScenes.draw(images=1)


def test_an_exact_mark_is_what_generation_says(small):
    model, processor = load_bundled()
    session = ChatSession(model, processor, settings=GenerationSettings(max_new_tokens=40))
    for mark in answer_questions(model, processor, small, image=lambda question: question.scene):
        session.reset()
        asked = mark.question.asked
        said = session.ask(asked.question, images=[small.images[mark.question.scene]]).text
        assert (said == asked.answer) == mark.exact
        assert mark.key or not mark.exact


@pytest.mark.parametrize("total", range(1, 200))
def test_an_interval_holds_its_value_at_both_ends(total):
    for right in (0, total):
        low, high = Score(right=right, total=total).interval()
        assert 0 <= low <= right / total <= high <= 1


def test_captions_that_say_everything_score_one_and_shuffled_ones_less(small):
    rng = random.Random(0)
    right = [CAPTION_TASK.write(scene, rng) for scene in small.scenes]
    results = Results()
    results.take_captions("caption", right, small.scenes)
    results.take_captions("shuffled", right[1:] + right[:1], small.scenes)
    assert results.metrics["caption"].value == 1.0
    assert set(results.by_objects["caption"]) <= {"1", "2", "3"}
    assert results.metrics["shuffled"].value < 0.2


def test_eval_prints_and_stores_every_metric(cli, tmp_path):
    out = tmp_path / "eval"
    done = cli("eval", "miniature", "--model", "toy", "--limit", 11, "--out", out, "--json")
    assert done.status == 0, done.stderr
    found = json.loads(done.stdout)
    assert list(found["metrics"]) == list(METRICS)
    assert found["metrics"]["text_qa"] > 80
    assert found["metrics"]["caption"] > 95
    assert found["metrics"]["vqa_blind"] < 60
    for name, (low, high) in found["intervals"].items():
        assert 0 <= low <= found["metrics"][name] <= high <= 100
    assert json.loads((out / "score.json").read_text())["metrics"] == found["metrics"]


def test_a_limit_holds_for_questions_and_images(cli, tmp_path):
    done = cli("eval", "miniature", "--model", "toy", "--limit", 2, "--out", tmp_path)
    assert done.status == 0, done.stderr
    assert "miniature: 2 questions, captions of 2 images\n" in done.stdout
    stored = json.loads((tmp_path / "score.json").read_text())
    assert (stored["n"], stored["images"]) == (2, 2)
    objects = sum(len(scene.objects) for scene in HeldOutScenes.draw(limit=2).scenes)
    assert sum(split["n"] for split in stored["by_objects"]["caption"].values()) == objects
    one, many = HeldOutScenes.draw(limit=1), HeldOutScenes.draw(limit=10_000)
    assert (len(one.questions), len(one.images)) == (1, 2)  # another scene's image is shown, too
    assert (len(many.questions), len(many.images)) == (660, 400)


def test_eval_is_reported_replaces_no_other_run_and_may_be_run_again(
    cli, tmp_path, tmp_path_factory
):
    common = ("eval", "miniature", "--out", tmp_path, "--batch-size", 2)
    done = cli(*common, "--model", "toy", "--limit", 2)
    assert done.status == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"manifest.json", "score.json"}
    table = cli("report", tmp_path, "--out", tmp_path / "report", "--json")
    assert table.status == 0, table.stderr
    score = json.loads((tmp_path / "score.json").read_text())
    lines = json.loads(table.stdout)["lines"]
    assert {line["metric"]: line["value"] for line in lines} == score["metrics"]
    objects = sum(len(scene.objects) for scene in HeldOutScenes.draw(limit=2).scenes)
    assert objects != 2
    captions = {"caption": objects, "caption_expert": objects}
    assert {line["metric"]: line["n"] for line in lines} == dict.fromkeys(METRICS, 2) | captions
    assert {line["system"] for line in lines} == {f"{tmp_path.name} (v2)"}
    assert "caption_expert" in (tmp_path / "report" / "report.html").read_text()
    shutil.rmtree(tmp_path / "report")
    stored = (tmp_path / "score.json").read_bytes()
    for other, changed in (
        (("--model", bundled_adapter("caption"), "--limit", 2), "model"),
        (("--model", "toy", "--limit", 3), "records"),
    ):
        refused = cli(*common, *other)
        assert refused.status == 2
        assert f"holds another run; {changed} was" in refused.stderr
        assert (tmp_path / "score.json").read_bytes() == stored
    again = cli(*common, "--model", "toy", "--limit", 2)
    assert (again.status, again.stdout) == (0, done.stdout)
    # the same weights elsewhere, in other batches, are the same model
    adapter = shutil.copytree(bundled_adapter("v2"), tmp_path_factory.mktemp("copied") / "v2")
    ours = ("eval", "miniature", "--out", tmp_path, "--model", adapter, "--limit", 2)
    again = cli(*ours, "--batch-size", 1)
    assert (again.status, again.stdout) == (0, done.stdout)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["model"]["directory"] == str(adapter)
    assert manifest["generation"]["batch_size"] == 1
    # other weights in the same place are not, as after a training anew
    weights = load_file(adapter / "adapter_model.safetensors")
    changed = {name: tensor * 1.5 for name, tensor in weights.items()}
    save_file(changed, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    stored = (tmp_path / "score.json").read_bytes()
    refused = cli(*ours)
    assert refused.status == 2
    assert "holds another run; model was" in refused.stderr
    assert (tmp_path / "score.json").read_bytes() == stored
    (tmp_path / "manifest.json").unlink()
    refused = cli(*common, "--model", "toy", "--limit", 2)
    assert refused.status == 2
    assert "holds a score without a manifest.json" in refused.stderr
    line = {"task": "vqa", "id": "1", "questions": ["what?"], "gold": "x", "answers": ["x"]}
    answers = tmp_path / "stored.jsonl"
    answers.write_text(json.dumps(line) + "\n")
    refused = cli("eval", "vqa", "--predictions", answers, "--out", tmp_path)
    assert refused.status == 2
    assert "holds the score.json of another run" in refused.stderr


def test_eval_refuses_what_the_task_has_no_use_for(cli, tmp_path):
    refused = cli("eval", "miniature", "--model", "toy", "--data", tmp_path, "--out", tmp_path)
    assert refused.status == 2
    assert "--data has no effect: the task miniature does not read it" in refused.stderr


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    recipe = demo_recipe(out, minutes=0.6, seed=1)
    captions, instructions = recipe.captions.sources[0], recipe.instructions.sources[0]
    captions.model_extra.update(count=96, images=48)
    instructions.model_extra.update(count=64)
    run_demo(
        out,
        recipe,
        HeldOutScenes.draw(images=12, questions=11),
        photographs=Gallery(missing="not asked for"),
        stage=quiet,
    )
    return out


def test_the_demonstration_measures_both_sides_and_writes_a_page(demo):
    results = json.loads((demo / "results.json").read_text())
    for side in ("bundled", "trained"):
        assert list(results[side]["metrics"]) == list(METRICS)
        for score in results[side]["metrics"].values():
            assert 0 <= score["low"] <= score["value"] <= score["high"] <= 1
    assert results["steps"] > 0
    assert set(results["trainable"]) == {"vision", "language"}
    page = (demo / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 9
    assert not re.search("https?:", page)  # no ":" is in base64, where "http" turns up by chance
    for name in METRICS:
        assert f"<td>{name}</td>" in page


def test_the_fresh_adapter_loads_and_answers(demo):
    from llama_adapter import LlamaAdapterForConditionalGeneration, LlamaAdapterProcessor

    model = LlamaAdapterForConditionalGeneration.from_pretrained(demo / "adapter")
    processor = LlamaAdapterProcessor.from_pretrained(demo / "adapter")
    session = ChatSession(model, processor, settings=GenerationSettings(max_new_tokens=3))
    assert session.ask("what do you see?").tokens <= 3


@pytest.mark.parametrize("name", ["adapter", "training"])
def test_a_demonstration_replaces_only_what_one_has_made(cli, tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine").touch()
    refused = cli("demo", "--out", tmp_path)
    assert refused.status == 2
    assert f"holds {name} that no demonstration made" in refused.stderr
    assert (tmp_path / name / "mine").exists()
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_what_a_demonstration_was_killed_in_may_be_replaced(tmp_path):
    claim(tmp_path / "out")
    (tmp_path / "out" / "training").mkdir()
    claim(tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--photos-only", "--minutes", 3), "--minutes has no effect: nothing is trained"),
        (("--quick", "--minutes", 3), "--minutes has no effect: --quick trains for one"),
    ],
)
def test_options_that_a_demonstration_does_not_read_are_refused(cli, tmp_path, arguments, words):
    refused = cli("demo", *arguments, "--out", tmp_path / "out")
    assert refused.status == 2
    assert words in refused.stderr
    assert not (tmp_path / "out").exists()
