"""The shipped encoder is a stock model that sees; remaking it is exact and can be resumed."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from tools.miniature.phrases import (
    ATTRIBUTES,
    IMAGE_SIZE,
    WORDS,
    PhraseScorer,
    judge,
    multi_hot,
    sample_batch,
    to_pixels,
    vision_loss,
)
from tools.miniature.vision_encoder import (
    BUNDLED_ENCODER,
    VisionTraining,
    image_processor,
    load_vision_encoder,
    new_vision_encoder,
    pretrain_vision,
)
from transformers import AutoImageProcessor, AutoModel, SiglipVisionModel

from llama_adapter.errors import TrainingError
from llama_adapter.miniature.rendering import render
from llama_adapter.miniature.scenes import HELD_OUT, Split, sample_scene


def quiet(line: str) -> None:
    """Report nowhere."""


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return SiglipVisionModel.from_pretrained(directory).state_dict()


def test_bundled_vision_encoder_is_a_stock_model() -> None:
    model = AutoModel.from_pretrained(BUNDLED_ENCODER)
    assert type(model) is SiglipVisionModel
    assert model.dtype is torch.float32
    assert (BUNDLED_ENCODER / "model.safetensors").stat().st_size < 3 * 2**20


def test_bundled_vision_encoder_reads_held_out_combinations() -> None:
    """Nearest neighbours in patch space share shape and colour, without any training."""
    rng = random.Random(0)
    encoder = load_vision_encoder()
    assert not any(p.requires_grad for p in encoder.parameters())

    def features(split: Split, count: int) -> tuple[list[tuple[str, str]], torch.Tensor]:
        scenes = [
            sample_scene(rng, split=split, num_objects=1, sign_probability=0) for _ in range(count)
        ]
        with torch.no_grad():
            patches = encoder(
                pixel_values=to_pixels([render(s, rng) for s in scenes])
            ).last_hidden_state
        pooled = patches.amax(1)
        return [(s.objects[0].shape, s.objects[0].color) for s in scenes], pooled

    known, known_features = features(Split.TRAIN, 300)
    asked, asked_features = features(Split.TEST, 60)
    means = {
        name: torch.stack(
            [
                known_features[[pair[axis] == word for pair in known]].mean(0)
                for word in ATTRIBUTES[name]
            ]
        )
        for axis, name in enumerate(("shape", "color"))
    }
    for axis, name in enumerate(("shape", "color")):
        nearest = torch.cdist(asked_features, means[name]).argmin(-1)
        right = [ATTRIBUTES[name][n] == pair[axis] for n, pair in zip(nearest, asked, strict=True)]
        assert sum(right) / len(right) > 2 / len(ATTRIBUTES[name])


def test_training_pixels_are_what_the_image_processor_makes() -> None:
    rng = random.Random(0)
    image = render(sample_scene(rng), rng)
    made = image_processor()(image, return_tensors="pt")["pixel_values"]
    shipped = AutoImageProcessor.from_pretrained(BUNDLED_ENCODER, backend="pil")
    torch.testing.assert_close(made, to_pixels([image]))
    torch.testing.assert_close(shipped(image, return_tensors="pt")["pixel_values"], made)
    large = render(sample_scene(rng), rng, size=256)
    assert shipped(large, return_tensors="pt")["pixel_values"].shape[-2:] == (IMAGE_SIZE,) * 2


def test_batches_name_no_held_out_combination() -> None:
    for seed in range(20):
        batch = sample_batch(random.Random(seed), size=16, fair=seed % 2 == 0)
        for phrase in batch.phrases_NW:
            words = {WORDS[i] for i in phrase.nonzero().flatten().tolist()}
            assert not any(set(pair) <= words for pair in HELD_OUT)
        for one in batch.objects_BTW.flatten(0, 1):
            words = {WORDS[i] for i in one.nonzero().flatten().tolist()}
            assert not any(set(pair) <= words for pair in HELD_OUT)


def test_a_fair_batch_leaves_held_out_combinations_undecided() -> None:
    batch = sample_batch(random.Random(0), size=32, fair=True)
    true_BNT, scored_BNT = judge(batch)
    circle, green = WORDS.index("circle"), WORDS.index("green")
    denies_circle = batch.phrases_NW[:, circle] > 0
    is_green = batch.objects_BTW[:, :, green] > 0
    assert is_green.any()
    assert not scored_BNT.transpose(1, 2)[is_green][:, denies_circle].any()
    assert (scored_BNT | ~true_BNT)[~batch.strange_B].all()
    assert scored_BNT.float().mean() > 0.5


def test_gradients_reach_the_whole_vision_encoder() -> None:
    generator = torch.Generator().manual_seed(0)
    encoder, scorer = (
        new_vision_encoder(generator=generator),
        PhraseScorer(128, generator=generator),
    )
    vision_loss(encoder, scorer, sample_batch(random.Random(0), size=4, fair=True)).backward()
    for name, parameter in [*encoder.named_parameters(), *scorer.named_parameters()]:
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0 or name.endswith("k_proj.bias"), name


def test_a_phrase_scores_by_the_sum_of_its_words() -> None:
    generator = torch.Generator().manual_seed(0)
    scorer = PhraseScorer(128, generator=generator)
    patches = torch.randn(1, 3, 128, generator=generator)
    phrases = [{"shape": "star"}, {"color": "red"}, {"shape": "star", "color": "red"}]
    star, red, both = scorer(patches, torch.stack([multi_hot(p) for p in phrases]))[0]
    one, two = scorer.bias_by_length[:2]
    torch.testing.assert_close(both - two, star + red - 2 * one)


def test_resumed_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    training = VisionTraining(steps=3, batch_size=4, fair_from=2)
    for name, stops in (("whole", (None,)), ("parts", (2, None))):
        for stop in stops:
            pretrain_vision(
                tmp_path / name,
                training=training,
                resume=True,
                stop_at=stop,
                scenes_each=2,
                report=quiet,
            )
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_resume_refuses_other_settings(tmp_path: Path) -> None:
    pretrain_vision(
        tmp_path,
        training=VisionTraining(steps=1, batch_size=2),
        scenes_each=1,
        report=quiet,
    )
    with pytest.raises(TrainingError, match="seed was 0, now 1"):
        pretrain_vision(
            tmp_path, training=VisionTraining(steps=1, batch_size=2, seed=1), resume=True
        )
