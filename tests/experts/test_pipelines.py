"""Second models of other kinds, tiny and real, without torchvision."""

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from llama_adapter.errors import ExpertError
from llama_adapter.experts import Request, make_experts
from llama_adapter.experts.caption import PipelineCaptionExpert
from llama_adapter.experts.detection import DetectionExpert, DetectionOptions
from llama_adapter.experts.wording import report_text

WORDS = ["<pad>", "<unk>", "<bos>", "<eos>", "a", "photo", "of", "dog", "ball", "red"]
TINY = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
IMAGE = Image.new("RGB", (40, 30), (200, 30, 30))


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 2), ("<eos>", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        model_max_length=16,
    )


@pytest.fixture(scope="module")
def captioner(tmp_path_factory, tokenizer):
    from transformers import (
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessorPil,
        BlipProcessor,
    )

    torch.manual_seed(0)
    text = TINY | {"vocab_size": 10, "encoder_hidden_size": 16, "max_position_embeddings": 40}
    special = {"bos_token_id": 2, "pad_token_id": 0, "eos_token_id": 3, "sep_token_id": 3}
    vision = TINY | {"image_size": 16, "patch_size": 8}
    config = BlipConfig(text_config=text | special, vision_config=vision, projection_dim=8)
    folder = tmp_path_factory.mktemp("blip")
    BlipForConditionalGeneration(config).save_pretrained(folder)
    images = BlipImageProcessorPil(size={"height": 16, "width": 16})
    BlipProcessor(images, tokenizer).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def finder(tmp_path_factory, tokenizer):
    from transformers import (
        OwlViTConfig,
        OwlViTForObjectDetection,
        OwlViTImageProcessorPil,
        OwlViTProcessor,
    )

    torch.manual_seed(0)
    special = {"bos_token_id": 2, "pad_token_id": 0, "eos_token_id": 3}
    text = TINY | special | {"vocab_size": 10, "max_position_embeddings": 16}
    vision = TINY | {"image_size": 32, "patch_size": 16}
    config = OwlViTConfig(text_config=text, vision_config=vision, projection_dim=16)
    folder = tmp_path_factory.mktemp("owl")
    OwlViTForObjectDetection(config).save_pretrained(folder)
    side = {"height": 32, "width": 32}
    images = OwlViTImageProcessorPil(size=side, crop_size=side)
    OwlViTProcessor(images, tokenizer).save_pretrained(folder)
    return str(folder)


def test_any_captioner_of_transformers_captions(captioner):
    [expert] = make_experts([f"caption={captioner},max_new_tokens=4"])
    assert isinstance(expert, PipelineCaptionExpert)
    report = expert.consult(Request(images=[IMAGE, IMAGE]))
    assert [finding.image for finding in report.findings] == [0, 1]
    assert report.findings[0].text == report.findings[1].text
    assert report.findings[0].text
    assert expert.info.version
    late = expert.consult(Request(images=[IMAGE], deadline=0.0))
    assert (late.findings, late.complete) == ((), False)
    assert late.notes == ("time for 0 of 1 images only",)


def test_any_captioner_takes_beams(captioner, monkeypatch):
    from transformers import BlipForConditionalGeneration

    asked, generate = [], BlipForConditionalGeneration.generate

    def seen(*args, **options):
        asked.append(options.get("num_beams", 1))
        return generate(*args, **options)

    monkeypatch.setattr(BlipForConditionalGeneration, "generate", seen)
    [one] = make_experts([f"caption={captioner}"])
    [three] = make_experts([f"caption={captioner},beams=3"])
    for expert in (one, three):
        assert expert.consult(Request(images=[IMAGE])).findings
    assert asked == [1, 3]
    assert one.info.version != three.info.version  # captions are remembered by it


def test_a_zero_shot_detector_looks_for_what_the_question_names(finder):
    expert = DetectionExpert(DetectionOptions(model=finder, confidence=0.0))
    report = expert.consult(Request(images=[IMAGE], question="Where is the dog?"))
    assert report.findings
    assert all("dog" in finding.text for finding in report.findings)
    for left, top, right, bottom in (finding.box for finding in report.findings):
        assert 0 <= left <= right <= 40
        assert 0 <= top <= bottom <= 30
    assert expert.info.uses_question
    nothing = expert.consult(Request(images=[IMAGE], question="What do you see?"))
    assert nothing.notes == ("the question names nothing to look for",)
    named = DetectionExpert(DetectionOptions(model=finder, labels=["ball"], confidence=0.0))
    assert not named.info.uses_question
    assert "ball" in report_text(named.consult(Request(images=[IMAGE])))


def test_what_cannot_caption_is_refused(finder, tmp_path):
    with pytest.raises(ExpertError, match="is not a usable image-text-to-text model"):
        make_experts([f"caption={finder}"])
    with pytest.raises(ExpertError, match="holds no model"):
        make_experts([f"caption={tmp_path}"])
