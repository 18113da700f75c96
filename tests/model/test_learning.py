"""Gradients reach every trainable and nothing else, whatever happened before."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from llama_adapter import model as adapter_model

PRESETS = ["v1", "v1-multimodal", "v2", "v2-chat"]


def _loss(model, ids, pictures):
    inputs = {"pixel_values": pictures} if model.adapter_config.is_multimodal else {}
    return model(ids, labels=ids, **inputs).loss


@pytest.mark.parametrize("preset", [*PRESETS, "everything"])
def test_gradients_reach_every_trainable_and_nothing_else(build, ids, pictures, preset):
    if preset == "everything":
        model = build("v2", lora_rank=2, gate_scale=True, scale_side="input", projector="mlp")
    else:
        model = build(preset)
    _loss(model.train(), ids, pictures).backward()

    trainable = dict(model.adapter.named_parameters())
    for name, parameter in trainable.items():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    mine = {id(parameter) for parameter in trainable.values()}
    for name, parameter in model.named_parameters():
        if id(parameter) not in mine:
            assert parameter.grad is None, name
            assert not parameter.requires_grad, name
    groups = [model.group_parameters("vision"), model.group_parameters("language")]
    assert {id(p) for group in groups for p in group} == mine
    assert len(groups[0]) + len(groups[1]) == len(mine)


@pytest.mark.parametrize("preset", PRESETS)
def test_everything_still_learns_after_evaluation_and_inference(build, ids, pictures, preset):
    model = build(preset)
    _loss(model.train(), ids, pictures).backward()
    expected = {name: p.grad.clone() for name, p in model.adapter.named_parameters()}

    model.zero_grad()
    model.eval()
    with torch.no_grad():
        _loss(model, ids, pictures)
    inputs = {"pixel_values": pictures} if model.adapter_config.is_multimodal else {}
    model.generate(input_ids=ids, max_new_tokens=3, **inputs)
    model.prepare_for_inference()
    model.generate(input_ids=ids, max_new_tokens=3, **inputs)
    model.prepare_for_training()

    _loss(model.train(), ids, pictures).backward()
    for name, parameter in model.adapter.named_parameters():
        assert_close(parameter.grad, expected[name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("preset", ["v2", "v1-multimodal"])
def test_checkpointing_gives_the_same_gradients(build, ids, pictures, preset):
    model = build(preset).train()
    _loss(model, ids, pictures).backward()
    expected = {name: p.grad.clone() for name, p in model.adapter.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    _loss(model, ids, pictures).backward()
    model.gradient_checkpointing_disable()
    for name, parameter in model.adapter.named_parameters():
        assert_close(parameter.grad, expected[name], rtol=1e-5, atol=1e-7, msg=name)


def test_a_fresh_v2_learns_from_its_first_step(build, ids, pictures):
    model = build(stirred=False).train()
    _loss(model, ids, pictures).backward()
    moved = {n for n, p in model.adapter.named_parameters() if p.grad.abs().sum() > 0}
    assert "layers.0.attention.visual_gate" in moved
    assert "layers.1.attention.gate" in moved
    assert "layers.3.mlp.up_proj.scale" in moved


def test_the_groups_are_those_of_the_paper(build):
    model = build(lora_rank=1)
    vision = [name for name, _ in model.adapter.named_parameters("vision")]
    language = [name for name, _ in model.adapter.named_parameters("language")]
    assert all(name.startswith("visual.") or name.endswith("visual_gate") for name in vision)
    kinds = {name.rsplit(".", 1)[1] for name in language}
    assert kinds == {"prompt", "gate", "weight", "bias", "scale", "lora_up", "lora_down"}
    assert "norm.weight" in language


def test_loss_counts_answer_tokens_only(build, ids):
    model = build("v2-chat")
    labels = ids.clone()
    labels[:, :4] = -100
    labels[2] = -100
    logits = model(ids).logits
    expected = torch.nn.functional.cross_entropy(
        logits[:2, 3:-1].reshape(-1, logits.shape[-1]), ids[:2, 4:].reshape(-1), reduction="sum"
    )
    assert_close(model(ids, labels=labels).loss, expected / 6)
    assert_close(model(ids, labels=labels, num_answer_tokens=60).loss, expected / 60)

    kept = torch.tensor([3, 4, 5])
    fewer = model(ids, labels=labels, logits_to_keep=kept)
    assert fewer.logits.shape[1] == 3
    assert_close(fewer.loss, expected / 6)
    assert_close(model(ids, labels=labels, logits_to_keep=4).loss, expected / 6)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kept_of", [lambda _: torch.tensor([3, 4, 5]), adapter_model.answer_mask])
def test_logits_where_they_count_give_the_same_gradients(build, ids, kept_of, checkpointing):
    model = build("v2-chat").train()
    labels = ids.clone()
    labels[:, :4] = -100
    labels[2] = -100
    model(ids, labels=labels).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.adapter.named_parameters()}
    model.zero_grad()
    if checkpointing:
        model.gradient_checkpointing_enable()
    model(ids, labels=labels, logits_to_keep=kept_of(labels)).loss.backward()
    for name, parameter in model.adapter.named_parameters():
        assert_close(parameter.grad, expected[name], rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize(
    "positions", [[5, 3, 4], [-5, -3], [3, 4, 4, 5], [], [i > 2 for i in range(7)]]
)
def test_positions_in_any_form_are_scored(build, ids, positions):
    model = build("v2").eval()
    kept = torch.tensor(positions, dtype=torch.bool if len(positions) == 7 else torch.long)
    output = model(ids, labels=ids, logits_to_keep=kept)
    targets = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)[:, kept]
    assert_close(output.logits, model(ids).logits[:, kept])
    summed = torch.nn.functional.cross_entropy(
        output.logits.flatten(0, 1), targets.flatten(), reduction="sum"
    )
    assert_close(output.loss, summed / max(1, int((targets != -100).sum())))


@pytest.mark.parametrize("kept_of", [lambda _: 0, adapter_model.answer_mask])
def test_a_batch_without_answers_has_loss_zero_with_a_gradient(build, ids, kept_of):
    model = build("v2-chat").train()
    labels = torch.full_like(ids, -100)
    loss = model(ids, labels=labels, logits_to_keep=kept_of(labels)).loss
    loss.backward()
    assert loss == 0
    assert all((p.grad == 0).all() for p in model.group_parameters("language"))


def test_a_function_applied_to_the_model_reaches_every_tensor_once(build):
    model = build("v2")
    model.add_adapter(model.config, "second")
    reached = []
    model._apply(lambda tensor: reached.append(id(tensor)) or tensor)
    assert len(reached) == len(set(reached))
    for name in model.adapters:
        assert {id(p) for _, p in model._adapters[name].named_parameters()} <= set(reached)
