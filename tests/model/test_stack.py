"""Many adapters in one batch: each row is what its adapter computes alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch.testing import assert_close

from llama_adapter import LlamaAdapterConfig, LlamaAdapterForConditionalGeneration
from llama_adapter.errors import ConfigError
from llama_adapter.model.stack import AdapterStack, RowReads
from llama_adapter.model.stack.bank import PromptBank

SMALL = {"prompt_length": 5, "projector_width": 32, "projector_heads": 4}
PLACEHOLDERS = {"visual_scope": "placeholders"}
KINDS: dict[str, dict[str, Any]] = {
    "early": {"preset": "v2", "visual_prompt_length": 6, "projector": "linear"},
    "early placeholders": {"preset": "v2", "visual_prompt_length": 3, **PLACEHOLDERS},
    "early own": {
        "preset": "v2",
        "visual_prompt_length": 4,
        "visual_layers": 2,
        "placeholder_attention": "own",
        **PLACEHOLDERS,
    },
    "late": {"preset": "v1-multimodal"},
    "late placeholders": {"preset": "v1-multimodal", "prompt_length": 7, **PLACEHOLDERS},
    "released lora": {
        "preset": "released-v2-lora-bias",
        "prompt_layers": 3,
        "visual_prompt_length": 5,
        "projector_blocks": 1,
        "vision_feature": -1,
        "lora_rank": 3,
    },
    "smaller lora": {"preset": "v2-chat", "lora_rank": 2, "bias_targets": "none"},
    "input scales": {"preset": "released-v2-chat"},
    "raw gates": {"preset": "v1", "gate": "raw"},
}
SEEN = [0, 0, 1, 1, 1, 0, 0]
"""Which tokens of a row of seven are placeholders."""


def make_models(base, tower, stir, kinds=KINDS, language_model=None) -> dict[str, Any]:
    """Models that share a base, detached, each with an adapter of its own."""
    language_model = base() if language_model is None else language_model
    vision, models = tower(), {}
    for seed, (name, settings) in enumerate(kinds.items()):
        preset = settings["preset"]
        changes = {key: value for key, value in settings.items() if key != "preset"}
        config = LlamaAdapterConfig.preset(preset, **{**SMALL, **changes})
        models[name] = model = LlamaAdapterForConditionalGeneration.from_base(
            language_model, vision, config, seed=0
        )
        stir(model, seed=seed)
        model.eval().disable_adapters()
    return models


def stacked(models: dict[str, Any], **options: Any) -> AdapterStack:
    first = next(iter(models.values()))
    stack = AdapterStack(first.language_model, **options)
    for name, model in models.items():
        stack.add(name, model.adapter, model.vision)
    return stack


def alone(model: Any, row: torch.Tensor, image: torch.Tensor | None) -> torch.Tensor:
    """Logits of one row by its adapter attached the usual way."""
    inputs = {}
    if image is not None and model.adapter_config.is_multimodal:
        inputs = {"pixel_values": image}
        if model.adapter_config.visual_scope == "placeholders":
            inputs["visual_mask"] = torch.tensor([SEEN]).bool()
    model.enable_adapters()
    logits = model(row, **inputs).logits
    model.disable_adapters()
    return logits


def reads_of(stack: AdapterStack, name: str, image: torch.Tensor | None) -> RowReads:
    adapter = stack[name]
    entry = 0 if image is None else stack.encode(name, image)[0]
    is_late = adapter.config.fusion == "late"
    if adapter.config.visual_scope == "all" or not entry:
        return RowReads(adapter=adapter.index, image=entry, is_late=is_late)
    images = [entry * seen for seen in SEEN]
    own = adapter.config.placeholder_attention == "own"
    ordinals = [0, 0, 0, 1, 2, 0, 0] if own else None
    return RowReads(adapter=adapter.index, images=images, ordinals=ordinals, is_late=is_late)


@torch.no_grad()
def test_every_kind_of_adapter_in_one_batch_is_as_it_is_alone(base, tower, stir):
    models = make_models(base, tower, stir)
    generator = torch.Generator().manual_seed(5)
    names = [*models, *models]
    ids = torch.randint(3, 97, (len(names) + 1, 7), generator=generator)
    pictures = torch.randn(len(names), 3, 16, 16, generator=generator)
    images = [p.unsqueeze(0) if i < len(models) else None for i, p in enumerate(pictures)]
    expected = [alone(models[name], ids[i : i + 1], images[i]) for i, name in enumerate(names)]
    language_model = models["early"].language_model
    plain = language_model(ids).logits

    stack = stacked(models)
    stack.attach()
    reads = [reads_of(stack, name, image) for name, image in zip(names, images, strict=True)]
    stack.select([*reads, RowReads()], num_tokens=7)
    found = language_model(ids).logits
    for i, name in enumerate(names):
        assert_close(found[i : i + 1], expected[i], rtol=1e-4, atol=1e-4, msg=f"{name}, row {i}")
    assert_close(found[-1], plain[-1], rtol=0, atol=0)
    for i, name in enumerate(names):  # alone in a pass, tables are read once for all rows
        stack.select([reads[i]], num_tokens=7)
        found = language_model(ids[i : i + 1]).logits
        assert_close(found, expected[i], rtol=1e-4, atol=1e-4, msg=name)
    stack.detach()
    assert_close(language_model(ids).logits, plain, rtol=0, atol=0)


FAMILIES = [
    transformers.Gemma3TextConfig,  # norms of 1 + w, key norms, sliding windows
    transformers.GPTNeoXConfig,  # layer norms, interleaved projections
    transformers.Phi3Config,  # projections side by side
    transformers.Olmo2Config,  # a key norm over all heads
]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_families_whose_norms_and_projections_are_their_own(tower, stir, family):
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    config = family(**sizes, **heads, bos_token_id=1, eos_token_id=None, pad_token_id=0)
    language_model = transformers.AutoModelForCausalLM.from_config(config).eval()
    kinds = {name: KINDS[name] for name in ("early", "early own", "late", "smaller lora")}
    models = make_models(None, tower, stir, kinds, language_model)
    ids = torch.randint(3, 97, (len(models) + 1, 7), generator=torch.Generator().manual_seed(5))
    image = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(6))
    expected = [alone(model, ids[i : i + 1], image) for i, model in enumerate(models.values())]
    plain = language_model(ids[-1:]).logits
    stack = stacked(models)
    stack.attach()
    rows = [reads_of(stack, name, image) for name in models]
    stack.select([*rows, RowReads()], num_tokens=7)
    found = language_model(ids).logits
    assert_close(found, torch.cat([*expected, plain]), rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_a_quantized_base(base, tower, stir, tmp_path, ids, pictures):
    pytest.importorskip("bitsandbytes", reason="pip install 'llama-adapter[quantization]'")
    base(intermediate_size=128).save_pretrained(tmp_path)
    language_model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path,
        quantization_config=transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        ),
        device_map="cpu",
        dtype=torch.float32,
    )
    kinds = {name: KINDS[name] for name in ("early", "released lora", "input scales")}
    models = make_models(None, tower, stir, kinds, language_model)
    expected = [alone(model, ids[:1], pictures[:1]) for model in models.values()]
    stack = stacked(models)
    stack.attach()
    stack.select([reads_of(stack, name, pictures[:1]) for name in models], num_tokens=7)
    found = language_model(ids[:1].expand(3, -1)).logits
    assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_adapter_0_is_the_base_bitwise_whatever_is_beside_it(base, tower, stir, ids, dtype):
    language_model = base().to(dtype)
    expected = language_model(ids).logits
    models = make_models(base, tower, stir, language_model=language_model)
    stack = stacked(models)
    stack.attach()
    for others in ([], ["early"], ["released lora", "input scales"]):
        rows = [RowReads(adapter=stack[name].index) for name in others]
        rows += [RowReads()] * (len(ids) - len(rows))
        stack.select(rows, num_tokens=ids.shape[1])
        found = language_model(ids).logits
        assert_close(found[len(others) :], expected[len(others) :], rtol=0, atol=0)


@torch.no_grad()
def test_adapters_come_and_go_while_others_stay(base, tower, stir, ids):
    models = make_models(base, tower, stir)
    stack = AdapterStack(models["early"].language_model, capacity=2)
    stack.attach()
    run = stack.language_model

    def logits(name: str) -> torch.Tensor:
        stack.select([RowReads(adapter=stack[name].index)] * len(ids), num_tokens=ids.shape[1])
        return run(ids).logits

    def expected(name: str) -> torch.Tensor:
        with stack.detached():
            models[name].enable_adapters()
            found = run(ids).logits
            models[name].disable_adapters()
        return found

    for before, name in [("", "released lora"), ("released lora", "early"), ("early", "late")]:
        stack.add(name, models[name].adapter, models[name].vision)
        assert_close(logits(name), expected(name), rtol=1e-4, atol=1e-4)
        if before:
            assert_close(logits(before), expected(before), rtol=1e-4, atol=1e-4)
            stack.remove(before)
            assert_close(logits(name), expected(name), rtol=1e-4, atol=1e-4)
    stack.add("input scales", models["input scales"].adapter)
    with pytest.raises(ConfigError, match="the stack holds 2 adapters"):
        stack.add("early", models["early"].adapter)
    with pytest.raises(ConfigError, match="'late' is loaded already"):
        stack.add("late", models["late"].adapter)
    with pytest.raises(ConfigError, match="no adapter 'lat'; loaded: input scales, late; did you"):
        stack["lat"]


@torch.no_grad()
def test_mixed_rows_follow_an_exchange_of_adapters_and_images(base, tower, stir, ids, pictures):
    """What was gathered for the same rows of the pass before is not used any longer."""
    names = ("early", "released lora", "late")
    models = make_models(base, tower, stir, {name: KINDS[name] for name in names})
    stack = AdapterStack(models["early"].language_model, capacity=2, image_capacity=1)
    stack.attach()
    stack.add("early", models["early"].adapter, models["early"].vision)

    def check(name: str, picture: int) -> None:
        image = pictures[picture : picture + 1]
        reads = reads_of(stack, "early", image)
        rows = [RowReads(adapter=stack[name].index), reads]
        for _ in range(2):
            stack.select(rows, num_tokens=7)
            found = stack.language_model(ids[:1].expand(2, -1)).logits
        with stack.detached():
            expected = [alone(models[name], ids[:1], None), alone(models["early"], ids[:1], image)]
        assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-4)
        stack.release([reads.image])

    for name in names[1:]:
        stack.add(name, models[name].adapter, models[name].vision)
        check(name, picture=0)
        check(name, picture=1)
        stack.remove(name)


@torch.no_grad()
def test_two_vision_encoders_serve_one_base(base, tower, stir, ids, pictures):
    language_model = base()
    models = make_models(base, tower, stir, {"one": KINDS["early"]}, language_model)
    config = LlamaAdapterConfig.preset("v1-multimodal", **SMALL)
    models["other"] = LlamaAdapterForConditionalGeneration.from_base(
        language_model, tower("clip"), config, seed=1
    )
    stir(models["other"])
    models["other"].disable_adapters()
    expected = [alone(models[name], ids[:1], pictures[:1]) for name in models]
    stack = stacked(models)
    stack.attach()
    stack.select([reads_of(stack, name, pictures[:1]) for name in models], num_tokens=7)
    found = language_model(ids[:1].expand(2, -1)).logits
    assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_an_adapter_alone_is_merged_and_no_longer_when_another_comes(base, tower, stir, ids):
    models = make_models(base, tower, stir, {k: KINDS[k] for k in ("early", "released lora")})
    expected = alone(models["early"], ids[:1], None)
    stack = AdapterStack(models["early"].language_model)
    stack.attach()
    stack.add("early", models["early"].adapter)
    linear = models["early"].language_model.model.layers[0].mlp.up_proj
    reads = RowReads(adapter=stack["early"].index)
    stack.select([reads], num_tokens=7)
    assert isinstance(linear.plain(), torch.nn.Linear)
    assert_close(stack.language_model(ids[:1]).logits, expected, rtol=1e-4, atol=1e-4)
    stack.add("released lora", models["released lora"].adapter)
    stack.select([reads], num_tokens=7)
    assert linear.plain() is None
    assert_close(stack.language_model(ids[:1]).logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_images_of_an_adapter_are_made_while_others_run(base, tower, stir, ids, pictures):
    models = make_models(base, tower, stir)
    stack = stacked(models, image_capacity=2)
    stack.attach()
    entries = stack.encode("early", pictures[:2])
    stack.select([RowReads(adapter=stack["early"].index, image=entries[0])], num_tokens=7)
    before = stack.language_model(ids[:1]).logits
    with pytest.raises(ConfigError, match="1 images, but there is place for 0 more"):
        stack.encode("late", pictures[2:])
    stack.release(entries[1:])
    [other] = stack.encode("late", pictures[2:])
    assert other == entries[1]
    stack.select([RowReads(adapter=stack["early"].index, image=entries[0])], num_tokens=7)
    assert_close(stack.language_model(ids[:1]).logits, before, rtol=0, atol=0)
    assert stack.encode("input scales", pictures[:1]) == [0]


def test_entries_of_other_lengths_in_other_layers_are_read_together():
    """A pass masks what it reads of all layers alike."""

    def prompts(length: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(2, length, 4), torch.randn(2, length, 4)

    bank = PromptBank(3, torch.device("cpu"))
    bank.put(1, {0: prompts(2), 1: prompts(2)})
    bank.put(2, {1: prompts(5)})
    query = torch.randn(2, 2, 3, 4)
    for layer in (0, 1):
        both = bank.read(layer, query, bank.of_rows([1, 2]), scale=1.0, softcap=None)
        for row in (0, 1):
            one = bank.read(
                layer, query[row : row + 1], bank.of_rows([row + 1]), scale=1.0, softcap=None
            )
            assert_close(both[row], torch.zeros_like(both[row]) if one is None else one[0])


def test_images_that_find_no_memory_take_no_places(base, tower, stir, pictures, monkeypatch):
    stack = stacked(make_models(base, tower, stir, {"early": KINDS["early"]}))
    free = stack.free_images

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(stack._images, "put", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        stack.encode("early", pictures[:2])
    assert stack.free_images == free
