"""Rows of one cache over every family: each row as the base alone, or the family is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from benchmarks import families
from benchmarks.families import FAMILIES

from llama_adapter.errors import UnsupportedModelError
from llama_adapter.generation.passes import Chunk, RowModel
from llama_adapter.generation.rows import Row, RowCache
from llama_adapter.model.stack import AdapterStack


def rows_over(language_model: Any, **options: Any) -> RowModel:
    options = {"rows": 4, "length": 64, **options}
    return RowModel(language_model, AdapterStack(language_model), **options)


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_rows_that_begin_at_different_times_are_as_alone(family):
    base = families.make_base(family)
    generator = torch.Generator().manual_seed(1)
    prompts = [
        torch.randint(3, families.VOCABULARY, (length,), generator=generator).tolist()
        for length in (3, 14, 9)
    ]
    alone = [
        base.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, pad_token_id=0)
        for prompt in prompts
    ]
    model = rows_over(base)
    texts = [list(prompt) for prompt in prompts]
    for row, text in enumerate(texts):  # in pieces, of which later rows come while others go on
        for start in range(0, len(text), 5):
            piece = Chunk(start=start, tokens=text[start : start + 5])
            logits = model.run(row, [piece])
        text.append(int(logits[-1].argmax()))
        started = texts[: row + 1]
        chunks = [Chunk(start=len(t) - 1, tokens=t[-1:]) for t in started]
        for t, token in zip(started, model.run(0, chunks).argmax(-1).tolist(), strict=True):
            t.append(token)
    for text, expected in zip(texts, alone, strict=True):
        found = expected[0].tolist()
        assert text[: len(found)] == found[: len(text)]


@pytest.mark.parametrize(("family", "kind"), [("lfm2", "conv"), ("qwen3_next", "linear_attention")])
def test_a_base_whose_cache_is_of_another_kind_is_refused_by_name(family, kind):
    layers = [kind, "full_attention"] * 2
    config = transformers.AutoConfig.for_model(
        family, **families.COMMON, head_dim=16, layer_types=layers
    )
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(UnsupportedModelError, match=rf"{family}.* cannot answer in rows"):
        rows_over(base)


def test_settings_of_the_base_that_rows_do_not_know_are_refused():
    base = families.make_base("llama")
    base.generation_config.no_repeat_ngram_size = 3
    with pytest.raises(UnsupportedModelError, match="sets no_repeat_ngram_size"):
        rows_over(base)


def test_what_a_row_holds_moves_with_it():
    cache = RowCache(num_layers=1, rows=3, length=4)
    cache.aim(first=0, starts=[0, 0], counts=[3, 2])
    keys = torch.arange(24.0).view(2, 1, 3, 4)
    held, _ = cache.update(keys, -keys, 0)
    assert torch.equal(held[0], keys[0])
    cache.rows[0].content, cache.rows[1].content = [1, 2, 3], [4, 5]
    cache.rows[0].owner = "a"
    cache.swap(0, 2)
    cache.copy(2, 1, 2)
    [layer] = cache.layers
    assert torch.equal(layer.keys[2, :3, 0], keys[0, 0])
    assert torch.equal(layer.values[1, :2, 0], -keys[0, 0, :2])
    assert cache.rows[1].content == [1, 2]
    assert cache.rows[1].common("a", [1, 2, 9]) == 2
    assert cache.rows[1].common("b", [1, 2, 9]) == 0
    assert Row().common("a", [1]) == 0
