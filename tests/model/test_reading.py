"""Which tokens read which picture: padding, mixed rows, packing, slots, frames, caches."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
from torch.testing import assert_close
from transformers import StaticCache

from llama_adapter import ConfigError
from llama_adapter.families.structure import CACHE

FUSIONS = [("v2", {}), ("v1-multimodal", {})]
SLOTTED = [*FUSIONS, ("v2", {"placeholder_attention": "own"})]
EXACT = {"rtol": 1e-5, "atol": 1e-5}


def _greedy_without_cache(model, ids, steps, **inputs):
    for _ in range(steps):
        logits = model(ids, **inputs, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    return ids


@pytest.mark.parametrize(("preset", "overrides"), FUSIONS)
@pytest.mark.parametrize("prepared", [False, True])
def test_cached_and_static_cache_agree_with_no_cache(
    build, ids, pictures, preset, overrides, prepared
):
    model = build(preset, **overrides)
    if prepared:
        model.prepare_for_inference()
    with torch.no_grad():
        expected = _greedy_without_cache(model, ids, 5, pixel_values=pictures)
    options = {"pixel_values": pictures, "max_new_tokens": 5, "do_sample": False}
    options["attention_mask"] = torch.ones_like(ids)
    assert torch.equal(model.generate(input_ids=ids, **options), expected)
    assert torch.equal(model.generate(input_ids=ids, use_cache=False, **options), expected)
    static = model.generate(
        input_ids=ids, cache_implementation="static", disable_compile=True, **options
    )
    assert torch.equal(static, expected)


@pytest.mark.parametrize(("preset", "overrides"), FUSIONS)
def test_step_by_step_logits_agree_with_one_pass(build, ids, pictures, preset, overrides):
    model = build(preset, **overrides)
    with torch.no_grad():
        whole = model(ids, pixel_values=pictures).logits
        visual = model.encode_visual(pictures, cache=True)
        for cache in (None, StaticCache(config=model.config, max_cache_len=16)):
            parts, past = [], cache
            for piece in (ids[:, :3], ids[:, 3:4], ids[:, 4:]):
                rows = torch.arange(len(ids))
                output = model(
                    piece,
                    cache=past,
                    visual_prompts=visual,
                    image_index=rows,
                    use_cache=True,
                )
                past = output[CACHE]
                parts.append(output.logits)
            assert_close(torch.cat(parts, dim=1), whole, **EXACT)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_earlier_tokens_go_by_either_name(build, ids, name):
    model = build("v2")
    with torch.no_grad():
        known = model(ids[:, :3], use_cache=True)[CACHE]
        continued = model(ids[:, 3:], use_cache=True, **{name: known}).logits
        assert_close(continued, model(ids).logits[:, 3:], **EXACT)


def test_generating_warns_of_nothing(build, ids, pictures):
    """transformers 5.24 does where the old name of its cache comes, or both names."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build().generate(input_ids=ids, pixel_values=pictures, max_new_tokens=3, do_sample=False)


@pytest.mark.parametrize(("preset", "overrides"), FUSIONS)
def test_a_left_padded_row_is_as_if_alone(build, ids, pictures, preset, overrides):
    model = build(preset, **overrides)
    short = ids[1:2, 3:]
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    padded = torch.where(mask.bool(), ids, 0)
    batch = model.generate(
        input_ids=padded,
        attention_mask=mask,
        pixel_values=pictures,
        max_new_tokens=5,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    alone = model.generate(
        input_ids=short,
        attention_mask=torch.ones_like(short),
        pixel_values=pictures[1:2],
        max_new_tokens=5,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert torch.equal(batch.sequences[1, 7:], alone.sequences[0, 4:])
    for ours, theirs in zip(batch.logits, alone.logits, strict=True):
        assert_close(ours[1:2], theirs, **EXACT)


@pytest.mark.parametrize(("preset", "overrides"), FUSIONS)
def test_rows_with_and_without_a_picture_share_a_batch(build, ids, pictures, preset, overrides):
    model = build(preset, **overrides)
    index = torch.tensor([1, -1, 0])
    with torch.no_grad():
        together = model(ids, pixel_values=pictures[:2], image_index=index).logits
        assert_close(together[0:1], model(ids[0:1], pixel_values=pictures[1:2]).logits, **EXACT)
        assert_close(together[1:2], model(ids[1:2]).logits, **EXACT)
        assert_close(together[2:3], model(ids[2:3], pixel_values=pictures[0:1]).logits, **EXACT)
    options = {"max_new_tokens": 4, "do_sample": False}
    tokens = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=pictures[:2],
        image_index=index,
        **options,
    )
    one = ids[1:2]
    alone = model.generate(input_ids=one, attention_mask=torch.ones_like(one), **options)
    assert torch.equal(tokens[1], alone[0])


@pytest.mark.parametrize(("preset", "overrides"), FUSIONS)
def test_packed_tokens_read_their_own_pictures(build, ids, pictures, preset, overrides):
    """Three rows end to end in one, behind a block mask, are the three rows."""
    model = build(preset, **overrides)
    row_of_token = torch.arange(3).repeat_interleave(7)
    index = torch.where(row_of_token == 1, -1, row_of_token)
    causal = torch.ones(21, 21, dtype=torch.bool).tril()
    block = causal & (row_of_token[:, None] == row_of_token)
    with torch.no_grad():
        packed = model(
            ids.reshape(1, 21),
            attention_mask=block[None, None],
            position_ids=torch.arange(7).repeat(3)[None],
            pixel_values=pictures,
            image_index=index[None],
        ).logits
        rows = model(ids, pixel_values=pictures, image_index=torch.tensor([0, -1, 2])).logits
    assert_close(packed.view(3, 7, -1), rows, **EXACT)


@pytest.mark.parametrize(("preset", "overrides"), FUSIONS)
def test_only_slots_read(build, ids, pictures, preset, overrides):
    model = build(preset, visual_scope="placeholders", **overrides)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    with torch.no_grad():
        nobody = model(ids, pixel_values=pictures, visual_mask=mask).logits
        assert_close(nobody, model(ids).logits, **EXACT)
        mask[:, 2:4] = True
        slots = model(ids, pixel_values=pictures, visual_mask=mask).logits
        # as if the picture were packed to those tokens
        index = torch.where(mask, torch.arange(3)[:, None], -1)
        packed = model(
            ids, pixel_values=pictures, image_index=index, visual_mask=torch.ones_like(mask)
        ).logits
        everyone = model(ids, pixel_values=pictures, visual_mask=torch.ones_like(mask)).logits
    assert_close(slots, packed, **EXACT)
    assert_close(slots[:, :2], nobody[:, :2], **EXACT)
    assert (slots[:, 2:] - nobody[:, 2:]).abs().amax((0, 2)).min() > 1e-4
    assert (slots - everyone).abs().max() > 1e-4
    with pytest.raises(ConfigError, match="visual_mask"):
        model(ids, pixel_values=pictures)


def test_a_slot_may_read_its_own_prompt_alone(build, ids, pictures):
    model = build(visual_scope="placeholders", placeholder_attention="own")
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, 1:5] = True
    with torch.no_grad():
        visual = model.encode_visual(pictures)
        before = model(ids, visual_prompts=visual, visual_mask=mask).logits
        for number in range(4):
            changed = visual.prompts_IMd.clone()
            changed[:, number] += 1
            other = dataclasses.replace(visual, prompts_IMd=changed)
            after = model(ids, visual_prompts=other, visual_mask=mask).logits
            slot = 1 + number
            assert torch.equal(after[:, :slot], before[:, :slot])
            assert (after - before)[:, slot].abs().max() > 1e-4
        # two pictures in a row of tokens: each begins with its own first prompt
        index = torch.tensor([[-1, 0, 0, 1, 1, -1, -1]] * 3)
        packed = model(ids, visual_prompts=visual, image_index=index, visual_mask=mask).logits
        swapped = dataclasses.replace(visual, prompts_IMd=visual.prompts_IMd[:, :2])
        assert_close(
            model(ids, visual_prompts=swapped, image_index=index, visual_mask=mask).logits, packed
        )


def test_own_slots_are_whole_in_one_pass(build, ids, pictures):
    model = build(visual_scope="placeholders", placeholder_attention="own")
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, 1:4] = True
    rows = torch.arange(len(ids))
    with torch.no_grad():
        whole = model(ids, pixel_values=pictures, visual_mask=mask).logits
        visual = model.encode_visual(pictures, cache=True)
        options = {"visual_prompts": visual, "image_index": rows, "use_cache": True}
        start = model(ids[:, :4], visual_mask=mask[:, :4], **options)
        rest = model(ids[:, 4:], visual_mask=mask[:, 4:], cache=start[CACHE], **options)
        assert_close(torch.cat([start.logits, rest.logits], dim=1), whole, **EXACT)
        cut = model(ids[:, :2], visual_mask=mask[:, :2], **options)
        with pytest.raises(ConfigError, match="all placeholders of an image in one pass"):
            model(ids[:, 2:], visual_mask=mask[:, 2:], cache=cut[CACHE], **options)


def test_each_placeholder_attention_what_a_single_prompt_would_give(build, ids, pictures):
    own = build(visual_scope="placeholders", placeholder_attention="own")
    every = build(visual_scope="placeholders")
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, 2] = True
    with torch.no_grad():
        visual = own.encode_visual(pictures)
        first = dataclasses.replace(visual, prompts_IMd=visual.prompts_IMd[:, :1].contiguous())
        # a softmax over one key is 1
        expected = every(ids, visual_prompts=first, visual_mask=mask).logits
        assert_close(own(ids, visual_prompts=visual, visual_mask=mask).logits, expected, **EXACT)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize(("preset", "overrides"), SLOTTED)
def test_generated_tokens_are_no_slots(build, ids, pictures, preset, overrides, per_token):
    model = build(preset, visual_scope="placeholders", **overrides)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, 1:4] = True
    inputs = {"pixel_values": pictures, "visual_mask": mask}
    if per_token:
        inputs["image_index"] = torch.where(mask, torch.arange(3)[:, None], -1)
    tokens = ids
    with torch.no_grad():
        for _ in range(5):
            grown = tokens.shape[1] - ids.shape[1]
            more = dict(inputs, visual_mask=torch.nn.functional.pad(mask, (0, grown)))
            if per_token:
                index = inputs["image_index"]
                more["image_index"] = torch.nn.functional.pad(index, (0, grown), value=-1)
            logits = model(tokens, **more).logits
            tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
    generated = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=5,
        do_sample=False,
        **inputs,
    )
    assert torch.equal(generated, tokens)


def test_per_token_pictures_stay_in_sight_while_generating(build, ids, pictures):
    model = build()
    index = torch.tensor([[-1, 0, 0, 0, 1, 1, 2]] * 3)
    expected = ids
    with torch.no_grad():
        for _ in range(4):
            grown = expected.shape[1] - ids.shape[1]
            wider = torch.nn.functional.pad(index, (0, grown), value=2)
            logits = model(expected, pixel_values=pictures, image_index=wider).logits
            expected = torch.cat([expected, logits[:, -1:].argmax(-1)], dim=1)
    tokens = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=pictures,
        image_index=index,
        max_new_tokens=4,
        do_sample=False,
    )
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize(("preset", "overrides"), FUSIONS)
@pytest.mark.parametrize("scope", ["all", "placeholders"])
def test_beams_and_sampling(build, ids, pictures, preset, overrides, scope):
    model = build(preset, visual_scope=scope, **overrides)
    inputs = {"attention_mask": torch.ones_like(ids), "pixel_values": pictures}
    if scope == "placeholders":
        inputs["visual_mask"] = torch.zeros_like(ids, dtype=torch.bool)
        inputs["visual_mask"][:, :2] = True
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": 3}
    beams = model.generate(input_ids=ids, **inputs, **options)
    assert beams.shape == (3, 11)
    one = {name: value[1:2] for name, value in inputs.items()}
    assert torch.equal(beams[1:2], model.generate(input_ids=ids[1:2], **one, **options))
    samples = model.generate(
        input_ids=ids, **inputs, max_new_tokens=4, do_sample=True, num_return_sequences=2
    )
    assert samples.shape == (6, 11)


@pytest.mark.parametrize("rule", ["mean", "concat", "late-mean"])
def test_frames(build, ids, pictures, rule):
    model = build(frame_rule=rule)
    frames = torch.stack([pictures, pictures.flip(0), pictures * 0.5], dim=1)
    still = pictures[:, None].expand(-1, 3, -1, -1, -1)
    with torch.no_grad():
        length = model.encode_visual(frames).prompts_IMd.shape[1]
        assert length == (18 if rule == "concat" else 6)
        moving = model(ids, pixel_values=frames).logits
        # attention to the same prompts three times over is attention to them once
        assert_close(
            model(ids, pixel_values=still).logits, model(ids, pixel_values=pictures).logits, **EXACT
        )
    assert (moving - model(ids, pixel_values=pictures).logits).abs().max() > 1e-4
    tokens = model.generate(input_ids=ids, pixel_values=frames, max_new_tokens=3)
    assert tokens.shape == (3, 10)


def test_several_pictures_need_an_index(build, ids, pictures):
    model = build()
    with pytest.raises(ConfigError, match="2 images for 3 rows"):
        model(ids, pixel_values=pictures[:2])


def test_features_and_prompts_stand_for_pictures(build, ids, pictures):
    model = build()
    with torch.no_grad():
        expected = model(ids, pixel_values=pictures).logits
        features = model.vision(pixel_values=pictures).last_hidden_state
        assert_close(model(ids, visual_features=features).logits, expected, rtol=0, atol=0)
        prompts = model.encode_visual(pictures)
        assert_close(model(ids, visual_prompts=prompts).logits, expected, rtol=0, atol=0)
        cached = model.encode_visual(pictures, cache=True)
        assert_close(model(ids, visual_prompts=cached).logits, expected, **EXACT)


def test_text_only_adapters_ignore_pictures_they_cannot_read(build, ids, pictures):
    model = build("v2-chat")
    assert model.encode_visual(pictures) is None
    assert_close(model(ids, pixel_values=pictures).logits, model(ids).logits, rtol=0, atol=0)
