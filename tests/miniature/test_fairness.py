"""Captions and other texts score no word as false that is held out with what they describe."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from llama_adapter.conversation import Conversation
from llama_adapter.miniature.bundled import load_decoder, load_tower, toy_processor
from llama_adapter.miniature.captions import CAPTION_TASK
from llama_adapter.miniature.fairness import (
    UNSCORED,
    FairlyScored,
    unscored_tokens,
)
from llama_adapter.miniature.lessons import PICTURE, LessonPlan, Lessons, collate
from llama_adapter.miniature.pictures import make_pool
from llama_adapter.miniature.recipes import V2
from llama_adapter.miniature.scenes import HELD_OUT, Scene, Split, Thing
from llama_adapter.model import LlamaAdapterConfig, LlamaAdapterForConditionalGeneration

SCENE = Scene(
    things=(
        Thing(shape="square", color="green", size="small", place="north"),
        Thing(shape="star", color="white", size="large", place="south"),
    )
)


@pytest.fixture(scope="module")
def processor():
    return toy_processor(V2)


@pytest.fixture(scope="module")
def batch(processor):
    import random

    text = CAPTION_TASK.write(SCENE, random.Random(0))
    talk = Conversation.ask("what do you see?", images=[PICTURE], answer=text)
    generator = torch.Generator().manual_seed(0)
    return collate(processor, [talk], features=torch.randn(1, 64, 128, generator=generator))


def test_just_the_held_out_words_are_left_out(processor, batch):
    unscored_BT = unscored_tokens(batch["labels"], [SCENE], processor.tokenizer)
    found = {
        processor.decode([label]): processor.decode([token])
        for label, token in zip(batch["labels"][0], unscored_BT[0], strict=True)
        if token >= 0
    }
    assert found == {"green": "yellow", "square": "circle", "white": "blue"}
    assert ("square", "yellow") in HELD_OUT
    assert ("circle", "green") in HELD_OUT
    assert ("star", "blue") in HELD_OUT


def test_lessons_about_texts_leave_the_same_words_out(processor):
    pool = make_pool(load_tower(), processor, V2, count=4, seed=0, split=Split.TRAIN)
    plan = LessonPlan(batch_size=2, instruction_batch_size=16)
    fair = Lessons(processor, pool, plan=plan, seed=0)
    unfair = Lessons(processor, pool, plan=replace(plan, fair=False), seed=0)
    held_out = {frozenset(pair) for pair in HELD_OUT}
    for step in range(4):
        batch = fair.instructions(step)
        left_out_BT = batch.pop(UNSCORED)
        assert (left_out_BT >= 0).any()
        named = left_out_BT[left_out_BT >= 0], batch["labels"][left_out_BT >= 0]
        pairs = {
            frozenset({processor.decode([token]), processor.decode([label])})
            for token, label in zip(*named, strict=True)
        }
        assert not pairs & held_out  # the partner of what is left out stands beside the label
        plain = unfair.instructions(step)
        assert UNSCORED not in plain
        assert all(torch.equal(batch[name], plain[name]) for name in plain)
        words = {processor.decode([token]) for token in named[0]}
        assert words <= set().union(*held_out)


def test_what_is_left_out_beside_a_picture_goes_by_the_text(processor):
    pool = make_pool(load_tower(), processor, V2, count=4, seed=0, split=Split.TRAIN)
    plan = LessonPlan(batch_size=32, beside_share=1.0)
    batch = Lessons(processor, pool, plan=plan, seed=0).captions(0)
    partner = {w: v for pair in HELD_OUT for v, w in (pair, pair[::-1])}
    shown = 0
    for labels_T, left_out_T in zip(batch["labels"], batch[UNSCORED], strict=True):
        said = processor.decode(labels_T[labels_T != -100], skip_special_tokens=True).split()
        if said[0] != "a" or len(said) not in (8, 7):  # one thing, in a caption
            continue
        for place in (left_out_T >= 0).nonzero().flatten():
            shown += 1
            assert partner[processor.decode([left_out_T[place]])] in " ".join(said)
    assert shown


def test_the_loss_is_cross_entropy_over_the_words_that_are_left(processor, batch):
    model = LlamaAdapterForConditionalGeneration.from_base(
        load_decoder(), load_tower(), LlamaAdapterConfig(adapter=V2), seed=0
    )
    fair = FairlyScored(model)
    plain = model(**batch, use_cache=False)
    same = fair(**batch, use_cache=False)
    assert torch.equal(plain.loss, same.loss)

    unscored_BT = unscored_tokens(batch["labels"], [SCENE], processor.tokenizer)
    output = fair(**batch, **{UNSCORED: unscored_BT}, use_cache=False)
    kept = (batch["labels"][0, 1:] != -100).nonzero().flatten()
    assert torch.allclose(output.logits, plain.logits[:, kept], atol=1e-5)
    logits_KV = plain.logits[0, kept].detach().double()
    wanted_K = batch["labels"][0, kept + 1]
    left_out_K = unscored_BT[0, kept + 1]
    probabilities_KV = logits_KV.softmax(-1)
    expected = 0.0
    for p_V, wanted, left_out in zip(probabilities_KV, wanted_K, left_out_K, strict=True):
        rest = 1 - (p_V[left_out] if left_out >= 0 else 0)
        expected -= float(torch.log(p_V[wanted] / rest)) / len(kept)
    assert output.loss.item() == pytest.approx(expected, abs=1e-5)
    assert output.loss < plain.loss
