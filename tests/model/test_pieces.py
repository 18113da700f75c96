"""A sequence in pieces is the sequence: chunks, lookups, assistants, caches, left padding."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import pad
from torch.testing import assert_close
from transformers import DynamicCache, StaticCache

from llama_adapter import ConfigError
from llama_adapter.families.structure import CACHE

EXACT = {"rtol": 1e-5, "atol": 1e-5}
SETTINGS = [
    ("v2", {}),
    ("v2", {"visual_scope": "placeholders"}),
    ("v2", {"visual_scope": "placeholders", "placeholder_attention": "own"}),
    ("v1-multimodal", {"visual_scope": "placeholders"}),
]
LENGTH = 9


def _inputs(model, *, rows=2, per_token=False):
    generator = torch.Generator().manual_seed(5)
    # repetitions, so that a lookup in the prompt finds something
    ids = torch.randint(3, 97, (rows, 3), generator=generator).repeat(1, 3)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(rows, 3, 16, 16, generator=generator),
    }
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, 2:7] = True
    if model.adapter_config.visual_scope == "placeholders":
        inputs["visual_mask"] = mask
    if per_token:
        # a token of each image: the second image begins in the middle of the placeholders
        inputs["image_index"] = torch.where(mask, (torch.arange(LENGTH) > 4).long(), -1)
    return inputs


def _greedy(model, inputs, steps):
    """Whole passes without a cache, the plain meaning of it all."""
    ends = model.adapter_config.visual_scope == "placeholders"
    for _ in range(steps):
        with torch.no_grad():
            logits = model(**inputs, use_cache=False).logits
        more = {"input_ids": logits[:, -1:].argmax(-1)}
        more["attention_mask"] = torch.ones_like(more["input_ids"])
        inputs = dict(inputs)
        for name, value in more.items():
            inputs[name] = torch.cat([inputs[name], value], dim=1)
        for name, new in (("visual_mask", False), ("image_index", -1)):
            if name in inputs:
                last = torch.full_like(inputs[name][:, -1:], new) if ends else inputs[name][:, -1:]
                inputs[name] = torch.cat([inputs[name], last], dim=1)
    return inputs["input_ids"]


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize(("preset", "overrides"), SETTINGS)
def test_every_way_of_decoding_is_greedy(build, preset, overrides, per_token):
    model = build(preset, **overrides)
    inputs = _inputs(model, per_token=per_token)
    expected = _greedy(model, inputs, 6)
    options = {"max_new_tokens": 6, "do_sample": False}
    for ways in (
        {},
        {"use_cache": False},
        {"cache_implementation": "static", "disable_compile": True},
        *({"prefill_chunk_size": size} for size in (1, 4, 8, 20)),
        {"prefill_chunk_size": 4, "cache_implementation": "static", "disable_compile": True},
    ):
        assert torch.equal(model.generate(**inputs, **options, **ways), expected), ways


@pytest.mark.parametrize(("preset", "overrides"), SETTINGS)
def test_speculation_is_greedy(build, base, preset, overrides):
    model = build(preset, **overrides)
    one = _inputs(model, rows=1)
    expected = _greedy(model, one, 8)
    options = {"max_new_tokens": 8, "do_sample": False}
    for assistant in (base(), base(seed=1, num_hidden_layers=1), build(preset, **overrides)):
        assert torch.equal(model.generate(**one, **options, assistant_model=assistant), expected)
    found = model.generate(**one, **options, prompt_lookup_num_tokens=3)
    assert torch.equal(found, expected)
    found = model.generate(**one, **options, assistant_early_exit=2)
    assert torch.equal(found, expected)
    assert model.language_model.config.num_hidden_layers == 4


@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize(("preset", "overrides"), SETTINGS)
def test_beams_in_chunks_are_the_same_beams(build, preset, overrides, chunk):
    model = build(preset, **overrides)
    inputs = _inputs(model)
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": 3}
    both = model.generate(**inputs, **options, prefill_chunk_size=chunk)
    for row in range(2):
        alone = {name: value[row : row + 1] for name, value in inputs.items()}
        assert torch.equal(both[row : row + 1], model.generate(**alone, **options))


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize(("preset", "overrides"), SETTINGS)
@pytest.mark.parametrize("whole", [False, True])
def test_generation_goes_on_from_a_cache(build, preset, overrides, whole, per_token):
    """Given either all tokens or the new ones alone, as transformers allows."""
    model = build(preset, **overrides)
    inputs = _inputs(model, per_token=per_token)
    expected = _greedy(model, inputs, 5)
    visual = model.encode_visual(inputs.pop("pixel_values"), cache=True)
    rows = {} if per_token else {"image_index": torch.arange(2)}
    for cut in (2, 8):  # placeholders are 2 to 6: no run is cut, which new tokens alone cannot tell
        start = {name: value[:, :cut] for name, value in inputs.items()}
        with torch.no_grad():
            known = model(**start, **rows, visual_prompts=visual, use_cache=True)[CACHE]
        rest = inputs
        if not whole:
            rest = {n: v if n == "attention_mask" else v[:, cut:] for n, v in inputs.items()}
        options = {"max_new_tokens": 5, "do_sample": False, CACHE: known}
        found = model.generate(**rest, **rows, **options, visual_prompts=visual)
        assert torch.equal(found[:, -5:], expected[:, -5:]), cut


def test_a_mask_of_another_length_than_the_prompt_is_refused(build):
    model = build(visual_scope="placeholders")
    inputs = _inputs(model)
    inputs["visual_mask"] = inputs["visual_mask"][:, :-1]
    with pytest.raises(ConfigError, match="visual_mask covers 8 tokens, but the prompt has 9"):
        model.generate(**inputs, max_new_tokens=2)
    with pytest.raises(ConfigError, match="visual_mask covers 8 tokens, but this pass has 9"):
        model(**inputs)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize(("preset", "overrides"), SETTINGS)
def test_passes_cut_anywhere_know_their_places(build, preset, overrides, per_token):
    model = build(preset, **overrides)
    inputs = _inputs(model, per_token=per_token)
    rows = {} if per_token else {"image_index": torch.arange(2)}
    with torch.no_grad():
        whole = model(**inputs).logits
        visual = model.encode_visual(inputs.pop("pixel_values"), cache=True)
        for sizes in ([2, 7], [3, 1, 1, 4], [1] * LENGTH, [5, 4]):
            for cache in (DynamicCache(), StaticCache(config=model.config, max_cache_len=12)):
                parts, stop = [], 0
                for size in sizes:
                    start, stop = stop, stop + size
                    piece = {name: value[:, :stop] for name, value in inputs.items()}
                    piece["input_ids"] = inputs["input_ids"][:, start:stop]
                    output = model(
                        **piece, **rows, visual_prompts=visual, cache=cache, use_cache=True
                    )
                    parts.append(output.logits)
                assert_close(torch.cat(parts, dim=1), whole, **EXACT)


# --- positions ------------------------------------------------------------------------------


@pytest.mark.parametrize(("preset", "overrides"), SETTINGS)
def test_a_left_padded_row_is_as_if_alone_in_forward(build, preset, overrides):
    model = build(preset, **overrides)
    inputs = _inputs(model)
    with torch.no_grad():
        expected = model(**inputs).logits
        padded = {
            name: value if name == "pixel_values" else pad(value, (4, 0), value=0)
            for name, value in inputs.items()
        }
        found = model(**padded).logits[:, 4:]
        assert_close(found, expected, **EXACT)
        # with a cache the mask covers what is cached too
        visual = model.encode_visual(padded.pop("pixel_values"))
        rows = {"image_index": torch.arange(2), "visual_prompts": visual}
        first = {name: value[:, :12] for name, value in padded.items()}
        known = model(**first, **rows, use_cache=True)[CACHE]
        last = dict(padded, input_ids=padded["input_ids"][:, 12:])
        again = model(**last, **rows, cache=known).logits
        assert_close(again[:, -1], expected[:, -1], **EXACT)


def test_a_mask_that_leaves_out_what_is_cached_is_refused(build, ids):
    model = build("v2-chat")
    known = model(ids, use_cache=True)[CACHE]
    with pytest.raises(ConfigError, match=r"covers 1 tokens, but there are 1 .* behind 7 cached"):
        model(ids[:, :1], attention_mask=torch.ones(3, 1), cache=known)


def test_right_padding_and_given_positions_stay(build, ids):
    model = build("v2-chat")
    with torch.no_grad():
        expected = model(ids).logits
        mask = pad(torch.ones_like(ids), (0, 3))
        found = model(pad(ids, (0, 3)), attention_mask=mask).logits[:, :7]
        assert_close(found, expected, **EXACT)
        position = torch.arange(7)[None].expand(3, -1)
        ones = torch.ones_like(ids)
        shifted = model(ids, attention_mask=ones, position_ids=position + 3).logits
        plain = model(ids, position_ids=position + 3).logits
        assert_close(shifted, plain, **EXACT)
        assert_close(model(ids, attention_mask=ones).logits, expected, **EXACT)


# --- embeddings in place of tokens ----------------------------------------------------------


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize(("preset", "overrides"), SETTINGS)
def test_embeddings_stand_for_tokens(build, preset, overrides, per_token):
    model = build(preset, **overrides)
    inputs = _inputs(model, per_token=per_token)
    options = {"max_new_tokens": 5, "do_sample": False}
    expected = model.generate(**inputs, **options)
    with torch.no_grad():
        logits = model(**inputs).logits
        embedded = dict(inputs)
        ids = embedded.pop("input_ids")
        embedded["inputs_embeds"] = model.get_input_embeddings()(ids)
        assert_close(model(**embedded).logits, logits, rtol=0, atol=0)
    assert torch.equal(model.generate(**embedded, **options), expected[:, ids.shape[1] :])
    chunked = {**options, "prefill_chunk_size": 4}
    if "visual_mask" in inputs:
        assert torch.equal(model.generate(**inputs, **chunked), expected)
