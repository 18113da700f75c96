"""The exam marks what greedy decoding would do, and its lessons never ask about a picture."""

from __future__ import annotations

import random
import re

import pytest
import torch

from llama_adapter.chat import ChatSession
from llama_adapter.conversation import Conversation
from llama_adapter.generation import GenerationSettings
from llama_adapter.miniature.bundled import load_bundled, load_tower, toy_processor
from llama_adapter.miniature.captions import describe_tasks
from llama_adapter.miniature.exam import Exam, Score, score, score_captions
from llama_adapter.miniature.fairness import FairlyScored
from llama_adapter.miniature.lessons import PICTURE, LessonPlan, Lessons, by_length, collate
from llama_adapter.miniature.pictures import make_pool, picture
from llama_adapter.miniature.recipes import V2
from llama_adapter.miniature.scenes import COLORS, HELD_OUT, SHAPES, Split


@pytest.fixture(scope="module")
def test_pool():
    processor = toy_processor(V2)
    return make_pool(load_tower(), processor, V2, count=24, seed=99, split=Split.TEST)


@pytest.fixture(scope="module")
def train_pool():
    processor = toy_processor(V2)
    return make_pool(load_tower(), processor, V2, count=24, seed=98, split=Split.TRAIN)


def test_wilson_interval_of_known_cases():
    low, high = Score(right=8, total=10).interval()
    assert low == pytest.approx(0.4902, abs=1e-4)
    assert high == pytest.approx(0.9433, abs=1e-4)
    assert Score(right=0, total=20).interval()[0] == 0.0


def test_every_test_scene_has_a_held_out_combination(test_pool, train_pool):
    def unseen(scene):
        return any((t.shape, t.color) in HELD_OUT for t in scene.things)

    assert all(unseen(scene) for scene in test_pool.scenes)
    assert not any(unseen(scene) for scene in train_pool.scenes)


def test_an_exact_mark_is_what_generation_says(test_pool):
    model, processor = load_bundled("v2")
    exam = Exam(test_pool, count=11)
    marks = exam.take(model, processor, picture=lambda item: item.scene)
    session = ChatSession(model, processor, settings=GenerationSettings(max_new_tokens=40))
    for mark in marks:
        session.reset()
        index = mark.item.scene
        image = picture(test_pool.scenes[index], seed=99, index=index)
        said = session.ask(mark.item.asked.question, images=[image]).text
        assert (said == mark.item.asked.answer) == mark.exact
        assert mark.key or not mark.exact


def test_captions_that_say_everything_score_one_and_shuffled_ones_less(test_pool):
    rng = random.Random(0)
    right = [describe_tasks()[0].write(scene, rng) for scene in test_pool.scenes]
    total, by_things = score_captions(right, test_pool)
    assert total.value == 1.0
    assert set(by_things) <= {1, 2, 3}
    assert score_captions(right[1:] + right[:1], test_pool)[0].value < 0.2


def test_the_same_exam_for_the_same_seed(test_pool):
    assert Exam(test_pool, count=22, seed=3).items == Exam(test_pool, count=22, seed=3).items
    assert score([]).total == 0


def test_lessons_depend_on_seed_and_step_alone(train_pool):
    processor = toy_processor(V2)
    plan = LessonPlan(batch_size=4, instruction_batch_size=4)
    first = Lessons(processor, train_pool, plan=plan, seed=1)
    second = Lessons(processor, train_pool, plan=plan, seed=1)
    second.captions(0)
    for one, other in (
        (first.captions(5), second.captions(5)),
        (first.instructions(5), second.instructions(5)),
    ):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_no_lesson_asks_about_a_picture(train_pool):
    """Caption lessons hold describe instructions only; instruction lessons hold no picture."""
    processor = toy_processor(V2)
    lessons = Lessons(
        processor, train_pool, plan=LessonPlan(batch_size=16, instruction_batch_size=16), seed=0
    )
    asked = {i for task in describe_tasks() for i in task.instructions}
    for step in range(5):
        batch = lessons.captions(step)
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            prompt = processor.decode(ids[(labels == -100) & (ids != 0)], skip_special_tokens=True)
            assert any(instruction in prompt for instruction in asked), prompt
        plain = lessons.instructions(step)
        assert "visual_features" not in plain
        assert "visual_mask" not in plain


def test_nothing_is_said_of_the_colors_of_a_picture_in_unnamed_colors():
    pool = make_pool(
        load_tower(), toy_processor(V2), V2, count=40, seed=3, split=Split.TRAIN, strange_share=1.0
    )
    assert all(pool.strange)
    processor = toy_processor(V2)
    plan = LessonPlan(batch_size=32, beside_share=0.0)
    lessons = Lessons(processor, pool, plan=plan, seed=0)
    for step in range(5):
        batch = lessons.captions(step)
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            said = set(processor.decode(ids[labels != -100]).replace(".", " ").split())
            assert not said & set(COLORS)
            assert said - {"<eos>"}


def test_a_text_beside_a_picture_is_what_is_described(train_pool):
    processor = toy_processor(V2)
    plan = LessonPlan(batch_size=16, beside_share=1.0)
    batch = Lessons(processor, train_pool, plan=plan, seed=0).captions(0)
    assert batch["visual_mask"].any(1).all()
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        prompt = processor.decode(ids[(labels == -100) & (ids != 0)], skip_special_tokens=True)
        _, text, instruction = re.split(r"text ?:|### ?instruction ?:", prompt)
        assert "picture" not in instruction
        answer = processor.decode(ids[labels != -100], skip_special_tokens=True)
        said = set(re.findall(r"[a-z]+", answer)) & {*SHAPES, *COLORS}
        assert said <= set(re.findall(r"[a-z]+", text))


def test_a_batch_in_parts_moves_the_adapter_as_the_whole_would(train_pool):
    processor, plan = toy_processor(V2), LessonPlan(batch_size=24, beside_share=0.2)
    lessons = Lessons(processor, train_pool, plan=plan, seed=0)
    whole = lessons.captions(0)
    short, long = by_length(whole)
    assert short["input_ids"].shape[1] < long["input_ids"].shape[1] == whole["input_ids"].shape[1]
    assert sum(int(x["attention_mask"].sum()) for x in (short, long)) == int(
        whole["attention_mask"].sum()
    )
    assert sum(x["input_ids"].numel() for x in (short, long)) < 0.8 * whole["input_ids"].numel()
    assert len(by_length(short)) == 1
    assert len(by_length({name: x[:1] for name, x in whole.items()})) == 1
    model, _ = load_bundled("v2")
    fair, count = FairlyScored(model), (whole["labels"][:, 1:] != -100).sum()
    gradients = []
    for parts in ([whole], [short, long]):
        for part in parts:
            fair(**part, num_answer_tokens=count).loss.backward()
        gradients.append(
            {n: p.grad for n, p in model.adapter.named_parameters() if p.grad is not None}
        )
        model.zero_grad(set_to_none=True)
    assert gradients[0].keys() == gradients[1].keys()
    assert any(name.startswith("visual.") for name in gradients[0])
    for name, gradient in gradients[0].items():
        scale = float(gradient.abs().max())
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-4, atol=1e-4 * scale), name


def test_dropout_takes_whole_channels_and_keeps_the_mean(train_pool):
    plan = LessonPlan(batch_size=16, feature_dropout=0.5)
    batch = Lessons(toy_processor(V2), train_pool, plan=plan, seed=0).captions(3)
    dropped_BC = (batch["visual_features"] == 0).all(1)
    assert 0.4 < dropped_BC.float().mean() < 0.6
    kept = LessonPlan(batch_size=16, feature_dropout=0.0)
    whole = Lessons(toy_processor(V2), train_pool, plan=kept, seed=0).captions(3)
    twice = 2 * whole["visual_features"] * ~dropped_BC[:, None]
    assert torch.equal(batch["visual_features"], twice)


def test_collated_slots_are_where_the_placeholder_stands():
    processor = toy_processor(V2)
    conversation = Conversation.ask("what do you see?", images=[PICTURE], answer="a star.")
    features = torch.zeros(1, 64, 8)
    batch = collate(processor, [conversation], features=features)
    marked = batch["input_ids"][batch["visual_mask"]]
    assert processor.decode(marked) == processor.placeholder_text
