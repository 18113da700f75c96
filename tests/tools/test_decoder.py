"""The decoder's tokenizer takes any text; its pretraining resumes bit for bit."""

from __future__ import annotations

import random

import pytest
import torch
from tools.miniature.decoder import DecoderPretraining
from tools.miniature.pretraining_text import sample_document
from tools.miniature.tokenizer import PLACEHOLDERS, build_tokenizer
from tools.miniature.wiring import PretrainSettings
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from llama_adapter.miniature.instructions import sample_instruction

TINY = PretrainSettings(
    steps=6, documents=2, hidden_size=64, layers=4, intermediate_size=32, gathering_layers=1
)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.mark.parametrize(
    "text",
    [
        "what colour is the star?",
        "the sign says 42.",
        "yes, there is a red star.",
        "a zebra in pyjamas, naïve café, 日本, 😀!",
        "### input: a red circle ### instruction: what? ### response: yes",
        "x",
    ],
)
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_case_and_spacing_do_not_matter(tokenizer):
    expected = tokenizer("what colour is the star?").input_ids
    assert tokenizer("What  colour is\nthe Star ?").input_ids == expected
    assert len(expected) == 7  # <bos>, five words, the question mark


def test_digits_and_template_marks_are_single_tokens(tokenizer):
    assert tokenizer.tokenize("42") == ["▁4", "▁2"]
    assert tokenizer.tokenize("### response:") == ["▁###", "▁response", "▁:"]


def test_every_word_of_the_world_is_one_token(tokenizer):
    rng = random.Random(0)
    spelt = set(range(3 + len(PLACEHOLDERS), tokenizer.convert_tokens_to_ids("z") + 1))
    for _ in range(300):
        instruction = sample_instruction(rng)
        text = " ".join(piece.text for piece in sample_document(rng).pieces)
        ids = tokenizer(f"{text} {instruction.instruction} {instruction.answer}").input_ids
        assert not spelt & set(ids)


def test_slots_are_special_and_reserved(tokenizer):
    ids = tokenizer(f"{PLACEHOLDERS[0]}{PLACEHOLDERS[15]} what?").input_ids
    assert ids[1:3] == tokenizer.convert_tokens_to_ids([PLACEHOLDERS[0], PLACEHOLDERS[15]])
    assert tokenizer.decode(ids, skip_special_tokens=True) == "what?"
    assert len(tokenizer) <= 700


def test_offsets_point_into_the_text(tokenizer):
    text = "The star is red."
    offsets = tokenizer(text, return_offsets_mapping=True).offset_mapping
    words = [text[start:end] for start, end in offsets[1:]]
    assert words == ["The", "star", "is", "red", "."]


def test_tokenizer_survives_saving(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "What colour is Bob's star 42?"
    assert loaded(text).input_ids == tokenizer(text).input_ids
    assert loaded.convert_tokens_to_ids(list(PLACEHOLDERS)) == tokenizer.convert_tokens_to_ids(
        list(PLACEHOLDERS)
    )


def test_resumed_pretraining_equals_uninterrupted(tmp_path):
    whole = DecoderPretraining(TINY)
    for _ in range(3):
        whole.step()
    interrupted = DecoderPretraining(TINY)
    interrupted.step()
    interrupted.save(tmp_path / "checkpoint.pt")
    resumed = DecoderPretraining.load(tmp_path / "checkpoint.pt")
    assert [resumed.step(), resumed.step()][1] > 0
    assert resumed.step_count == whole.step_count
    for (name, a), b in zip(
        whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name


def test_export_is_a_stock_llama(tmp_path):
    run = DecoderPretraining(TINY)
    run.step()
    run.export(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(model, LlamaForCausalLM)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer("a small red star in the north.", return_tensors="pt").input_ids
    with torch.no_grad():
        run.model.set_attn_implementation("sdpa")
        torch.testing.assert_close(model(ids).logits, run.model(ids).logits)


@pytest.fixture(scope="module")
def fresh_attentions():
    run = DecoderPretraining(PretrainSettings())
    run.model.set_attn_implementation("eager")
    ids = run.tokenizer(
        "a small red star in the north, a large blue circle in the south. where is the circle",
        return_tensors="pt",
    ).input_ids
    with torch.no_grad():
        return run.model(ids, output_attentions=True).attentions


def test_the_first_layer_starts_looking_back(fresh_attentions):
    last = fresh_attentions[0].shape[-1] - 1
    found = fresh_attentions[0][0, :, last].argmax(-1).tolist()
    assert found == [last - 1, last - 2, last - 3, last - 4, last - 5]


def test_the_third_layer_starts_looking_behind_the_same_word(fresh_attentions):
    circle = 12  # <bos> a small red star in the north , a large blue circle
    found = fresh_attentions[2][0, 1:, -1].argmax(-1).tolist()
    assert found == [circle + 1, circle + 2, circle + 3, circle + 4]
