"""Boxes in words, and a real detector of random numbers, without torchvision."""

import pytest
import torch
from PIL import Image

from llama_adapter.errors import ExpertError
from llama_adapter.experts import Finding, Request
from llama_adapter.experts.detection import (
    DetectionExpert,
    DetectionOptions,
    grouped,
    nouns,
    place,
)
from llama_adapter.experts.wording import report_text

LABELS = {0: "dog", 1: "ball"}


def seen(label, box, confidence=0.9):
    return Finding(text=label, kind="object", confidence=confidence, box=box)


@pytest.mark.parametrize(
    ("box", "where"),
    [
        ((0, 0, 20, 20), "top left"),
        ((40, 0, 60, 20), "top"),
        ((80, 0, 100, 20), "top right"),
        ((0, 40, 20, 60), "left"),
        ((40, 40, 60, 60), "center"),
        ((80, 40, 100, 60), "right"),
        ((0, 80, 20, 100), "bottom left"),
        ((40, 80, 60, 100), "bottom"),
        ((80, 80, 100, 100), "bottom right"),
        ((2, 2, 98, 99), "filling the image"),
    ],
)
def test_places_are_cells_of_a_grid(box, where):
    assert place(box, size=(100, 100)) == where
    wide = (box[0] * 3, box[1], box[2] * 3, box[3])
    assert place(wide, size=(300, 100)) == where


def test_objects_of_one_kind_and_place_are_counted():
    things = [
        seen("ball", (80, 80, 95, 95)),
        seen("dog", (0, 30, 30, 60)),
        seen("dog", (5, 40, 32, 70)),
        seen("dog", (1, 31, 30, 61), 0.6),  # the first one once more
    ]
    found = grouped(things, size=(100, 100))
    assert [f.text for f in found] == ["2 x dog, left", "ball, bottom right"]
    assert found[0].box == (0, 30, 32, 70)


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    from transformers import (
        DetrConfig,
        DetrForObjectDetection,
        DetrImageProcessorPil,
        ResNetConfig,
    )

    torch.manual_seed(0)
    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 8, 16], depths=[1] * 4, out_features=["stage4"]
    )
    config = DetrConfig(
        use_timm_backbone=False,
        backbone=None,
        use_pretrained_backbone=False,
        backbone_config=backbone,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=6,
        id2label=LABELS,
        label2id={name: number for number, name in LABELS.items()},
    )
    folder = tmp_path_factory.mktemp("detr")
    DetrForObjectDetection(config).save_pretrained(folder)
    sizes = {"shortest_edge": 64, "longest_edge": 96}
    DetrImageProcessorPil(size=sizes).save_pretrained(folder)
    return str(folder)


def test_a_detr_says_what_is_where(detector):
    expert = DetectionExpert(DetectionOptions(model=detector, confidence=0.0))
    images = [Image.new("RGB", (64, 48), (200, 30, 30)), Image.new("RGB", (48, 64))]
    report = expert.consult(Request(images=images, question="what is there?"))
    assert {finding.image for finding in report.findings} == {0, 1}
    assert report_text(report).startswith("Image 1: In the image: ")
    for finding in report.findings:
        assert finding.kind == "object"
        assert any(label in finding.text for label in ("dog", "ball"))
        left, top, right, bottom = finding.box
        assert left <= right
        assert top <= bottom
    assert expert.info.version is not None
    assert expert.info.uses_question is False


def test_nothing_sure_enough_is_said(detector):
    expert = DetectionExpert(DetectionOptions(model=detector, confidence=1.0))
    report = expert.consult(Request(images=[Image.new("RGB", (64, 48))], question="?"))
    assert report_text(report) == ""
    assert report.notes == ("nothing seen with a confidence of 1 or more",)


def test_what_cannot_detect_is_refused(detector, adapter_dir, tmp_path):
    with pytest.raises(ExpertError, match="holds no model"):
        DetectionExpert(DetectionOptions(model=str(tmp_path)))
    with pytest.raises(ExpertError, match="not a usable zero-shot-object-det"):
        DetectionExpert(DetectionOptions(model=str(adapter_dir.parent / "base")))
    with pytest.raises(ExpertError, match="labels are for zero-shot"):
        DetectionExpert(DetectionOptions(model=detector, labels=["cat"]))
    with pytest.raises(ExpertError, match=r"confidence: input should be greater than or.* -1"):
        DetectionOptions(model=detector, confidence=-1)


def test_nouns_are_what_a_zero_shot_detector_looks_for():
    assert nouns("Where is the red umbrella?") == ("red", "umbrella")
    assert nouns("What do you see?") == ()
