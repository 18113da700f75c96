"""What Hugging Face's tools pass is honoured or refused; nothing vanishes."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch.testing import assert_close
from transformers import Trainer, TrainingArguments

from llama_adapter import ConfigError, LlamaAdapterConfig, LlamaAdapterForConditionalGeneration

SAME = {"rtol": 0, "atol": 0}


# --- keywords -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [("pixel_value", "pixel_values"), ("visual_masks", "visual_mask"), ("lables", "labels")],
)
def test_a_misspelt_keyword_is_refused(build, ids, wrong, meant):
    model = build()
    for call in (model, model.generate, model.backbone):
        with pytest.raises(ConfigError, match=f"no keyword '{wrong}'; did you mean '{meant}'"):
            call(input_ids=ids, **{wrong: ids})
    with pytest.raises(ConfigError, match="no keyword 'max_new_token'; did you mean 'max_new_tok"):
        model.generate(input_ids=ids, max_new_token=3)


def test_keywords_of_the_base_arrive(build, ids):
    model = build("v2-chat")
    output = model(ids, output_hidden_states=True, output_attentions=False)
    assert len(output.hidden_states) == 5


def test_number_of_items_divides_the_loss(build, ids):
    model = build("v2-chat")
    with torch.no_grad():
        summed = model(ids, labels=ids, num_answer_tokens=1).loss
        for items in (50, torch.tensor(50)):
            assert_close(model(ids, labels=ids, num_items_in_batch=items).loss, summed / 50, **SAME)
        # our own name, where both are given
        both = model(ids, labels=ids, num_items_in_batch=7, num_answer_tokens=50).loss
        assert_close(both, summed / 50, **SAME)


def test_accumulation_in_the_trainer_is_one_large_batch(build, ids, tmp_path):
    """Four batches of one row, unevenly scored, give the step of one batch of four rows."""
    rows = torch.cat([ids, ids[:1].flip(1)])
    labels = rows.clone()
    for row, scored in enumerate((6, 1, 3, 2)):
        labels[row, : rows.shape[1] - scored] = -100
    records = [{"input_ids": r, "labels": scored} for r, scored in zip(rows, labels, strict=True)]
    losses, steps = [], []
    for size in (4, 1):
        model = build("v2-chat").train()
        arguments = TrainingArguments(
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=4 // size,
            max_steps=1,
            optim="sgd",
            learning_rate=0.1,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            remove_unused_columns=False,
        )
        trainer = Trainer(model, arguments, train_dataset=records)
        losses.append(trainer.train().training_loss)
        steps.append({n: p.detach().clone() for n, p in model.adapter.named_parameters()})
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert_close(steps[1], steps[0], rtol=1e-4, atol=1e-6)


def test_a_tuple_where_one_is_asked_for(build, ids, pictures):
    model = build()
    output = model(ids, pixel_values=pictures, labels=ids)
    assert output[0] is output.loss
    loss, logits, *_ = model(ids, pixel_values=pictures, labels=ids, return_dict=False)
    assert_close(loss, output.loss, **SAME)
    assert_close(logits, output.logits, **SAME)
    assert_close(model(ids, pixel_values=pictures, return_dict=True).logits, output.logits, **SAME)


def test_checkpointing_takes_its_keywords_or_refuses_them(build, ids):
    model = build("v2-chat").train()
    expected = model(ids, labels=ids).loss
    for options in (None, {"use_reentrant": False}, {"preserve_rng_state": False}):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        loss = model(ids, labels=ids, use_cache=False).loss
        assert_close(loss, expected, **SAME)
        loss.backward()
    with pytest.raises(ConfigError, match="use_reentrant=True"):
        model.gradient_checkpointing_enable({"use_reentrant": True})


def test_checkpointing_by_its_newer_name_as_trainer_calls_it(build, ids):
    model = build("v2-chat").train()
    expected = model(ids, labels=ids).loss
    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable is None:
        pytest.skip("this transformers has the older name alone")
    enable(activation_checkpointing_kwargs=None, every_n_layers=2, offload=False)
    layers = model.get_decoder().layers
    assert [layer.gradient_checkpointing for layer in layers] == [True, False, True, False]
    loss = model(ids, labels=ids, use_cache=False).loss
    assert_close(loss, expected, **SAME)
    loss.backward()
    assert all(p.grad is not None for p in model.group_parameters("language"))


# --- a backbone -----------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["v2", "v1-multimodal"])
def test_the_head_on_the_backbone_is_the_model(build, ids, pictures, preset):
    """As trainers call it that score hidden states in pieces."""
    model = build(preset)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": pictures}
    states = model.base_model(**inputs, use_cache=False).last_hidden_state
    head = model.get_output_embeddings()
    assert_close(head(states), model(**inputs).logits, **SAME)
    states.square().sum().backward()
    assert all(p.grad is not None for p in model.group_parameters("vision"))
    assert getattr(model, model.base_model_prefix) is not model
    assert {name.split(".")[0] for name, _ in model.named_parameters()} >= {"language_model"}
    assert not any("backbone" in name for name, _ in model.named_parameters())
    assert copy.deepcopy(model).base_model(**inputs).last_hidden_state.shape == states.shape


def test_shapes_of_the_base_stand_in_the_config(build):
    model = build()
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
        assert getattr(model.config, name) == getattr(model.language_model.config, name)
        assert name not in model.config.to_dict()
        assert not hasattr(LlamaAdapterConfig(), name)


# --- adapters by name -----------------------------------------------------------------------


def test_adapters_come_and_go_by_name(build, ids, pictures, base):
    model = build()
    with torch.no_grad():
        first = model(ids, pixel_values=pictures).logits
        plain = base()(ids).logits
        model.add_adapter(LlamaAdapterConfig.preset("v1", prompt_length=3), "second", seed=0)
        assert model.adapters == ("default", "second")
        assert model.active_adapters() == ["default"]
        assert_close(model(ids, pixel_values=pictures).logits, first, **SAME)
        model.set_adapter("second")
        assert model.active_adapter == "second"
        assert_close(model(ids).logits, plain, **SAME)
        model.disable_adapters()
        assert model.active_adapters() == []
        model.enable_adapters()
        assert model.active_adapters() == ["second"]
        names = set(model.get_adapter_state_dict("second"))
        assert names == set(model.get_adapter_state_dict())
        assert "visual.projector.norm.weight" in model.get_adapter_state_dict("default")

        model.set_adapter("default")
        model.delete_adapter("second")
        assert model.adapters == ("default",)
        assert_close(model(ids, pixel_values=pictures).logits, first, **SAME)
        # the name is free again
        model.add_adapter(LlamaAdapterConfig.preset("v1").adapter_config, "second")


def test_adapters_are_refused_in_our_own_words(build):
    model = build()
    config = LlamaAdapterConfig.preset("v1", prompt_length=3)
    model.add_adapter(config, "second")
    for call, message in (
        (lambda: model.delete_adapter("secnd"), "no adapter 'secnd'; .*did you mean 'second'"),
        (lambda: model.set_adapter("secnd"), "no adapter 'secnd'; .*did you mean 'second'"),
        (lambda: model.delete_adapter("default"), "'default' is the active one"),
        (lambda: model.delete_adapter(["second", "default"]), "'default' is the active one"),
        (lambda: model.add_adapter(config, "second"), "'second' is loaded already"),
        (lambda: model.add_adapter({"r": 8}, "third"), "takes a LlamaAdapterConfig, got dict"),
        (lambda: model.enable_peft_hotswap(), "hot-swapping"),
        (lambda: model.get_adapter_state_dict("third"), "no adapter 'third'"),
    ):
        with pytest.raises(ConfigError, match=message):
            call()
    assert model.adapters == ("default", "second")


def test_no_adapter_method_is_peft_s_own():
    """Every method that transformers has for peft's adapters has a meaning here."""
    from transformers.integrations.peft import PeftAdapterMixin

    theirs = {n for n, f in inspect.getmembers(PeftAdapterMixin, inspect.isfunction) if n[0] != "_"}
    ours = LlamaAdapterForConditionalGeneration
    assert not [n for n in theirs if getattr(ours, n) is getattr(PeftAdapterMixin, n)]
