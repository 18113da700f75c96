"""Hugging Face's Trainer resumes from its checkpoints of an adapter, and ends with the best one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from torch.testing import assert_close
from transformers import Trainer, TrainingArguments

from llama_adapter import CheckpointError, LlamaAdapterForConditionalGeneration

SAME = {"rtol": 0, "atol": 0}


@pytest.fixture
def records(ids: Any, pictures: Any) -> list[dict[str, Any]]:
    rows = zip(ids, pictures, strict=True)
    return [{"input_ids": row, "labels": row, "pixel_values": image} for row, image in rows]


def trainer_of(model: Any, folder: Path, records: list[dict[str, Any]], **settings: Any) -> Trainer:
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=1,
        max_steps=4,
        save_steps=2,
        learning_rate=0.05,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **settings,
    )
    return Trainer(model, arguments, train_dataset=records, eval_dataset=records)


def learned(model: Any) -> dict[str, Any]:
    return {name: tensor.clone() for name, tensor in model.adapter.state_dict().items()}


@pytest.mark.parametrize("preset", ["v2", "v1-multimodal"])
def test_a_run_that_is_resumed_ends_as_one_that_was_not(build, records, tmp_path, preset):
    whole = build(preset)
    trainer_of(whole, tmp_path, records).train()
    checkpoint = tmp_path / "checkpoint-2"

    again = build(preset, stirred=False)
    trainer_of(again, tmp_path / "again", records).train(resume_from_checkpoint=str(checkpoint))
    assert_close(learned(again), learned(whole), **SAME)
    # `True` finds the last one, as after a kill
    shutil.rmtree(tmp_path / "checkpoint-4")
    third = build(preset, stirred=False)
    trainer = trainer_of(third, tmp_path, records)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4
    assert_close(learned(third), learned(whole), **SAME)


def test_the_best_checkpoint_is_what_remains(build, records, tmp_path):
    model = build()
    trainer = trainer_of(
        model,
        tmp_path,
        records,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,  # so that the best is not the last
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    base, vision = model.language_model, model.vision
    model.disable_adapters()
    best = LlamaAdapterForConditionalGeneration.from_pretrained(
        tmp_path / "checkpoint-2", language_model=base, vision=vision
    )
    assert_close(learned(model), learned(best), **SAME)


def test_a_checkpoint_is_an_adapter_directory_under_one_more_name(build, records, tmp_path):
    model = build()
    trainer = trainer_of(model, tmp_path, records)
    trainer.train()
    weights = tmp_path / "checkpoint-4" / "adapter_model.safetensors"
    assert weights.with_name("model.safetensors").samefile(weights)
    trainer.save_model(str(tmp_path / "saved"))
    assert not (tmp_path / "saved" / "model.safetensors").exists()
    # saved once more into the same folder, both names are of the new file
    model.save_pretrained(tmp_path / "checkpoint-4")
    assert weights.with_name("model.safetensors").read_bytes() == weights.read_bytes()


def test_states_are_an_adapters_or_the_models(build):
    model, other = build(), build(stirred=False)
    other.load_state_dict(model.adapter.state_dict())
    assert_close(learned(other), learned(model), **SAME)
    third = build(stirred=False)
    missing, unexpected = third.load_state_dict(model.state_dict())
    assert (missing, unexpected) == ([], [])
    assert_close(learned(third), learned(model), **SAME)
    projector = {k: v for k, v in model.state_dict().items() if k.startswith("visual.")}
    assert build(stirred=False).load_state_dict(projector, strict=False).unexpected_keys == []
    damaged = dict(model.adapter.state_dict())
    damaged.popitem()
    with pytest.raises(CheckpointError, match=r"the adapter's state lacks \['visual"):
        third.load_state_dict(damaged, strict=False)
    with pytest.raises(CheckpointError, match="unexpected"):
        third.load_state_dict(build("v1").adapter.state_dict(), strict=False)
    assert_close(learned(third), learned(model), **SAME)
