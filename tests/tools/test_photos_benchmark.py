"""What `eval` does not measure of photographs: retrieval, perplexity, paired differences."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from benchmarks import photos
from PIL import Image


def measured(capsys: pytest.CaptureFixture[str], monkeypatch: Any, *arguments: Any) -> Any:
    monkeypatch.setattr(sys, "argv", ["photos", *map(str, arguments)])
    photos.main()
    return json.loads(capsys.readouterr().out)["results"]


def test_the_nearest_photo_lends_its_most_central_caption(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    colors = {"red": (220, 20, 20), "green": (20, 220, 20), "blue": (20, 20, 220)}
    items = []
    for name, color in colors.items():
        for split, size in (("train", 40), ("test", 60), ("val", 60)):
            shown = colors["blue"] if split == "val" else color
            Image.new("RGB", (size, size), shown).save(tmp_path / f"{name}-{split}.png")
            captions = ["odd one out", f"all is {name}", f"all here is {name} now"]
            items.append({"image": f"{name}-{split}.png", "captions": captions, "split": split})
    path = tmp_path / "captions.json"
    path.write_text(json.dumps(items))
    out = tmp_path / "out" / "answers.json"
    # as many photos of another split: their features are not those that were kept of the first
    for split, expected in (("test", list(colors)), ("val", ["blue"] * 3)):
        found = measured(
            capsys, monkeypatch, "retrieval", "--captions", path, "--predictions", out,
            "--vision", "package:llama_adapter/miniature/bases/vision", "--layer", "-1",
            "--split", split,
        )  # fmt: skip
        assert found == {"photos": 3, "candidates": 3}
        said = {line["image_id"]: line["caption"] for line in json.loads(out.read_text())}
        pairs = zip(colors, expected, strict=True)
        assert said == {f"{name}-{split}": f"all is {other}" for name, other in pairs}


def test_perplexity_is_compared_with_the_base_on_the_same_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [{"instruction": f"say {w}", "input": "", "output": w} for w in ("red", "blue", "star")]
    path = tmp_path / "texts.json"
    path.write_text(json.dumps(texts * 3))
    photo = tmp_path / "photo.png"
    Image.new("RGB", (32, 32), "red").save(photo)
    [found] = measured(
        capsys, monkeypatch, "perplexity", "--model", "toy", "--texts", path, "--photo", photo,
        "--held-out", 3,
    ).values()  # fmt: skip
    assert found["answers"] == 3
    base, adapted = found["base"]["perplexity"], found["adapter"]["perplexity"]
    assert found["adapter/base"]["ratio"] == pytest.approx(adapted / base)
    assert found["adapter_with_photo"]["perplexity"] != adapted


def test_answers_are_kept_and_none_is_taken_for_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [{"question_id": n, "text": f"say {w}"} for n, w in enumerate(("red", "a blue star"))]
    asked = tmp_path / "question.jsonl"
    asked.write_text("".join(json.dumps(line) + "\n" for line in lines))
    photo = tmp_path / "photo.png"
    Image.new("RGB", (32, 32), "red").save(photo)
    options = [
        "questions", "--model", "toy", "--questions", asked, "--reference", asked,
        "--photo", photo, "--answers", tmp_path / "kept",
    ]  # fmt: skip
    short = measured(capsys, monkeypatch, *options, "--max-new-tokens", 1)
    assert short["adapter"]["cut_at_the_limit"] == 2
    longer = measured(capsys, monkeypatch, *options, "--max-new-tokens", 9)
    assert longer["adapter"]["cut_at_the_limit"] < 2
    monkeypatch.setattr(photos, "answer", None)  # nothing is asked again
    assert measured(capsys, monkeypatch, *options, "--max-new-tokens", 1) == short


def test_runs_are_compared_over_the_records_that_both_answered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for run, right, first in (("own", 4, 0), ("blind", 1, 1)):
        lines = [
            {
                "task": "vqav2", "id": str(n), "questions": ["?"], "gold": ["yes"] * 10,
                "images": [f"{n}.jpg"], "facts": {"answer_type": "yes/no"},
                "answers": ["yes" if n < right + first else "no"],
            }
            for n in range(first, 6)
        ]  # fmt: skip
        (tmp_path / run).mkdir()
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / run / "predictions.jsonl").write_text(text)
    found = measured(capsys, monkeypatch, "compare", "vqav2", tmp_path / "own", tmp_path / "blind")
    assert found["records"] == 5
    accuracy = found["difference"]["accuracy"]
    assert accuracy["value"] == pytest.approx(100 * (3 - 1) / 5)
    low, high = accuracy["interval"]
    assert low <= accuracy["value"] <= high


def test_a_photo_without_a_caption_in_one_run_is_compared_in_neither(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for run, empty in (("own", 0), ("blind", 3)):
        lines = [
            {
                "task": "coco-caption", "id": str(n), "questions": [""],
                "gold": [f"a dog in place {n}"], "images": [f"{n}.jpg"], "facts": {},
                "answers": ["" if n == empty else f"a dog in place {n}"],
            }
            for n in range(4)
        ]  # fmt: skip
        (tmp_path / run).mkdir()
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / run / "predictions.jsonl").write_text(text)
    found = measured(
        capsys, monkeypatch, "compare", "coco-caption", tmp_path / "own", tmp_path / "blind"
    )
    assert found["records"] == 2
    assert found["difference"]["BLEU-1"] == {"value": 0.0, "interval": [0.0, 0.0]}


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ([{"image": "a.png", "captions": ["A dog."]}], "a text `split`"),
        ([{"image": "a.png", "captions": [], "split": "test"}], "a list of `captions`"),
        ({"images": []}, "record 0 is {'images': []}"),
        ([{"image": "a.png", "captions": ["A dog."], "split": "test"}], "needs two photos"),
    ],
)
def test_captions_that_cannot_be_used_are_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    records: Any,
    words: str,
) -> None:
    path = tmp_path / "captions.json"
    path.write_text(json.dumps(records))
    with pytest.raises(SystemExit) as ended:
        measured(capsys, monkeypatch, "captions", "--model", "toy", "--captions", path)
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert words in said
    assert said.startswith("error: ")
    assert said.count("\n") == 1
