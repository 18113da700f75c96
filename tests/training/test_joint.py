"""Disjoint groups: each loss updates its own parameters and not a bit of the others'."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel

from llama_adapter.errors import TrainingError
from llama_adapter.model import (
    Group,
    LlamaAdapterConfig,
    LlamaAdapterForConditionalGeneration,
)
from llama_adapter.training.joint import JointTrainer
from llama_adapter.training.recipe import LanguageAnneal, OptimizerSection
from llama_adapter.training.schedule import language_scale


def tiny_model(**overrides: object) -> LlamaAdapterForConditionalGeneration:
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    vision = SiglipVisionConfig(
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    settings = {
        "prompt_length": 4,
        "visual_prompt_length": 4,
        "projector_width": 16,
        "projector_heads": 2,
        "projector_blocks": 1,
        **overrides,
    }
    return LlamaAdapterForConditionalGeneration.from_base(
        LlamaForCausalLM(text),
        SiglipVisionModel(vision),
        LlamaAdapterConfig.preset("v2", **settings),
        seed=0,
    )


def batch(seed: int, *, picture: bool) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 61, (3, 8), generator=generator)
    labels = ids.clone()
    labels[:, :4] = -100
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    if picture:
        made["pixel_values"] = torch.randn(3, 3, 16, 16, generator=generator)
    return made


def numbers(model: LlamaAdapterForConditionalGeneration, group: Group) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.group_parameters(group)]


def trainer_of(model: LlamaAdapterForConditionalGeneration, **changes: object) -> JointTrainer:
    values = {"warmup_steps": 1, "weight_decay": 0.1, **changes}
    return JointTrainer(model, OptimizerSection.model_validate(values), steps=20)


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize(
    ("kind", "moved", "still"),
    [("caption", Group.VISION, Group.LANGUAGE), ("instruction", Group.LANGUAGE, Group.VISION)],
)
def test_a_step_of_one_kind_moves_only_its_group(kind: str, moved: Group, still: Group) -> None:
    model = tiny_model()
    trainer = trainer_of(model)
    # momentum and decay of both groups are alive before the step that is watched
    trainer.step(caption=batch(1, picture=True), instruction=batch(2, picture=False))
    before_moved, before_still = numbers(model, moved), numbers(model, still)

    trainer.step(**{kind: batch(3, picture=kind == "caption")})

    assert same(numbers(model, still), before_still)
    assert not same(numbers(model, moved), before_moved)


def test_a_pair_is_one_optimizer_step() -> None:
    trainer = trainer_of(tiny_model())
    report = trainer.step(caption=batch(1, picture=True), instruction=batch(2, picture=False))
    assert trainer.step_count == 1
    assert set(report.losses) == {"caption", "instruction"}
    assert set(report.grad_norms) == {"vision", "language"}
    (adamw,) = trainer.optimizers
    states = adamw.state.values()
    assert {int(state["step"]) for state in states} == {1}


def test_a_pair_equals_its_two_passes() -> None:
    """The pair's update of a group is that of its own loss alone, to the bit."""
    pair, apart = tiny_model(), tiny_model()
    trainer_of(pair).step(caption=batch(1, picture=True), instruction=batch(2, picture=False))
    trainer = trainer_of(apart)
    trainer.step(instruction=batch(2, picture=False))
    assert same(numbers(pair, Group.LANGUAGE), numbers(apart, Group.LANGUAGE))


def test_naive_joint_moves_everything_on_both_losses() -> None:
    model = tiny_model(fusion="late", visual_prompt_length=4)
    before = numbers(model, Group.LANGUAGE)
    trainer_of(model, joint="naive").step(caption=batch(1, picture=True))
    assert not same(numbers(model, Group.LANGUAGE), before)


def test_every_trainable_learns_also_after_an_evaluation() -> None:
    model = tiny_model()
    trainer = trainer_of(model, gate_lr=0.5)
    for seed in range(3):  # gates must open before what is behind them gets a gradient
        trainer.step(caption=batch(seed, picture=True), instruction=batch(seed, picture=False))
    model.eval()
    inputs = batch(9, picture=True)
    inputs.pop("labels")
    model.prepare_for_inference()
    model.generate(**inputs, max_new_tokens=2, do_sample=False, pad_token_id=0)
    model.prepare_for_training()
    before = dict(model.adapter.named_parameters())
    before = {name: p.detach().clone() for name, p in before.items()}
    trainer.step(caption=batch(7, picture=True), instruction=batch(8, picture=False))
    unmoved = [n for n, p in model.adapter.named_parameters() if torch.equal(p, before[n])]
    assert unmoved == []


def test_the_base_never_moves() -> None:
    model = tiny_model()
    with model.adapters_disabled():
        before = {n: p.clone() for n, p in model.language_model.state_dict().items()}
    trainer = trainer_of(model, joint="naive")
    trainer.step(caption=batch(1, picture=True), instruction=batch(2, picture=False))
    with model.adapters_disabled():
        after = model.language_model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_trainer_goes_on_from_its_state() -> None:
    whole, halves = tiny_model(), tiny_model()
    trainer = trainer_of(whole)
    for seed in range(4):
        trainer.step(caption=batch(seed, picture=True), instruction=batch(seed, picture=False))
    first = trainer_of(halves)
    for seed in range(2):
        first.step(caption=batch(seed, picture=True), instruction=batch(seed, picture=False))
    second = trainer_of(halves)
    second.load_state_dict(first.state_dict())
    for seed in range(2, 4):
        second.step(caption=batch(seed, picture=True), instruction=batch(seed, picture=False))
    for group in Group:
        assert same(numbers(whole, group), numbers(halves, group))


def test_micro_batches_weigh_by_their_answer_tokens() -> None:
    """Uneven micro-batches make the step of the one batch that they are parts of."""
    whole, parts = tiny_model(), tiny_model()
    one = batch(1, picture=True)
    one["labels"][0, 4:7] = -100
    split = [{name: t[rows] for name, t in one.items()} for rows in ([0], [1, 2])]
    expected = trainer_of(whole).step(caption=one)
    found = trainer_of(parts).step(caption=split)
    assert found.losses == pytest.approx(expected.losses, abs=1e-6)
    assert found.answer_tokens == expected.answer_tokens == {"caption": 9}
    for group in Group:
        torch.testing.assert_close(numbers(parts, group), numbers(whole, group))


def test_a_step_that_is_not_finite_moves_nothing() -> None:
    model = tiny_model()
    trainer = trainer_of(model)
    before = {group: numbers(model, group) for group in Group}
    bad = batch(1, picture=True)
    bad["pixel_values"][0] = float("nan")
    report = trainer.step(caption=bad, instruction=batch(2, picture=False))
    assert report.skipped
    assert report.not_finite() == ["caption loss"]
    assert trainer.step_count == 1
    assert all(same(numbers(model, group), before[group]) for group in Group)
    assert not trainer.step(caption=batch(1, picture=True)).skipped


def test_captions_without_a_readable_picture_are_a_step_that_moves_nothing_by_them() -> None:
    model = tiny_model()
    trainer = trainer_of(model, weight_decay=0.0)
    before = numbers(model, Group.VISION)
    lost = batch(1, picture=False)
    lost["labels"][:] = -100
    report = trainer.step(caption=lost)
    assert report.losses == {"caption": 0.0}
    assert same(numbers(model, Group.VISION), before)


def test_gates_norms_biases_and_scales_are_never_decayed() -> None:
    model = tiny_model()
    trainer = trainer_of(model, weight_decay=0.1)
    names = {id(p): name for name, p in model.adapter.named_parameters()}
    decayed = {
        names[id(p)].rsplit(".", 1)[-1]
        for group in trainer.optimizers[0].param_groups
        for p in group["params"]
        if group["weight_decay"]
    }
    assert decayed == {"prompt", "query", "weight"}
    for group in trainer.optimizers[0].param_groups:
        assert group["weight_decay"] == 0 or all(p.ndim > 1 for p in group["params"])


def test_refusals() -> None:
    model = tiny_model()
    with pytest.raises(TrainingError, match="a caption batch, an instruction batch"):
        trainer_of(model).step()
    model.prepare_for_inference()
    with pytest.raises(TrainingError, match="prepare_for_training"):
        trainer_of(model)


def test_muon_moves_the_projectors_matrices_and_nothing_of_language() -> None:
    model = tiny_model()
    trainer = trainer_of(model, projector_optimizer="muon")
    names = {id(p): name for name, p in model.adapter.named_parameters()}
    held = [
        {names[id(p)] for group in optimizer.param_groups for p in group["params"]}
        for optimizer in trainer.optimizers
    ]
    assert held[0].isdisjoint(held[1])
    assert held[0] | held[1] == set(names.values())
    assert held[1] == {
        name
        for name, p in model.adapter.named_parameters(Group.VISION)
        if p.ndim == 2 and name.endswith(".weight")
    }
    before = {name: p.clone() for name, p in model.adapter.named_parameters()}
    language = numbers(model, Group.LANGUAGE)
    for step in range(2):  # gates are zero in the first
        trainer.step(caption=batch(step, picture=True))
    moved = {n for n, p in model.adapter.named_parameters() if not torch.equal(p, before[n])}
    assert held[1] <= moved
    assert same(numbers(model, Group.LANGUAGE), language)


def test_training_with_muon_goes_on_to_the_bit() -> None:
    def batches(step: int) -> dict[str, dict[str, torch.Tensor]]:
        return {
            "caption": batch(step, picture=True),
            "instruction": batch(50 + step, picture=False),
        }

    whole = trainer_of(tiny_model(), projector_optimizer="muon")
    for step in range(4):
        whole.step(**batches(step))
    first = trainer_of(tiny_model(), projector_optimizer="muon")
    for step in range(2):
        first.step(**batches(step))
    second = trainer_of(tiny_model(), projector_optimizer="muon")
    second.load_parameter_state(first.parameter_state())
    second.load_state_dict(first.state_dict())
    for step in range(2, 4):
        second.step(**batches(step))
    expected = whole.parameter_state()
    assert all(torch.equal(t, expected[name]) for name, t in second.parameter_state().items())


def test_language_is_annealed_to_its_factor_and_vision_is_not() -> None:
    section = OptimizerSection(language_anneal=LanguageAnneal(until=0.2, factor=0.1))
    assert language_scale(section, 0, 100) == 1.0
    assert language_scale(section, 10, 100) == pytest.approx(0.55)
    assert language_scale(section, 20, 100) == pytest.approx(0.1)
    assert language_scale(section, 100, 100) == pytest.approx(0.1)
    assert language_scale(OptimizerSection(), 50, 100) == 1.0
    trainer = trainer_of(tiny_model(), language_anneal={"until": 0.1, "factor": 0.5})
    report = None
    for step in range(4):
        report = trainer.step(instruction=batch(step, picture=False))
    assert report is not None
    assert report.lr["language"] == pytest.approx(report.lr["vision"] / 2)


def test_the_projectors_matrices_may_have_a_learning_rate_of_their_own() -> None:
    model = tiny_model()
    (adamw,) = trainer_of(model, projector_lr=0.123).optimizers
    matrices = {id(t.parameter) for t in model.adapter.trainables() if t.is_matrix}
    own = [group for group in adamw.param_groups if group["lr"] == 0.123]
    assert {id(p) for group in own for p in group["params"]} == matrices
