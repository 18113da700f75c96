"""What the official code computed on tiny random models, against us: the same numbers.

Logits, loss, greedy continuations, ragged batches, cached and uncached decoding, and the gradient
of every parameter under the authors' names; then every ingredient is dropped in turn and must be
missed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from llama_adapter import LlamaAdapterForConditionalGeneration
from llama_adapter.checkpoints import ImportReport, import_released
from llama_adapter.checkpoints.layout import BaseShape, Entry, layout
from llama_adapter.families.structure import CACHE
from llama_adapter.model.scaled_linear import LearnedNorm

FIXTURES = Path(__file__).resolve().parents[3] / "shared" / "fixtures" / "released"
LOGITS, GRADIENTS = 2e-5, 1e-5
MATTERS = 1e-3
"""What is dropped must move some logit by fifty times the tolerance."""

VARIANTS: list[Any] = sorted(path.parent.name for path in FIXTURES.glob("*/meta.json")) or [
    pytest.param("", marks=pytest.mark.skip(reason=f"no reference outputs at {FIXTURES}"))
]


@dataclass(frozen=True)
class Case:
    source: Path
    directory: Path
    report: ImportReport
    model: LlamaAdapterForConditionalGeneration
    expected: dict[str, Tensor]
    inputs: dict[str, Tensor]

    @property
    def tokens(self) -> Tensor:
        return self.inputs["tokens"]

    @property
    def visual(self) -> dict[str, Tensor]:
        return {k: self.inputs[k] for k in ("pixel_values",) if k in self.inputs}

    @property
    def labels(self) -> Tensor:
        return self.inputs["labels"].masked_fill(self.inputs["labels"] == 0, -100)

    def logits(self, **options: Any) -> Tensor:
        with torch.no_grad():
            return self.model(input_ids=self.tokens, **self.visual, **options).logits

    def entries(self) -> list[Entry]:
        projector = self.model.visual
        return layout(
            self.report.kind,
            self.report.config,
            BaseShape.of(self.model.language_model.config),
            feature_size=None
            if projector is None
            else projector.projector.feature_proj.in_features,
        )


def make_case(source: Path, out: Path, **options: Any) -> Case:
    vision = source / "clip_visual.safetensors"
    report = import_released(
        source / "adapter.pth",
        base=source / "base",
        vision=vision if vision.is_file() else None,
        out=out,
        **options,
    )
    return Case(
        source=source,
        directory=out,
        report=report,
        model=LlamaAdapterForConditionalGeneration.from_pretrained(out),
        expected=load_file(source / "expected.safetensors"),
        inputs=load_file(source / "inputs.safetensors"),
    )


@pytest.fixture(scope="module", params=VARIANTS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(FIXTURES / request.param, tmp_path_factory.mktemp("imported") / "adapter")


@pytest.fixture(autouse=True)
def whole(case: Case) -> Iterator[None]:
    """Whatever a test drops is back for the next one."""
    before = {name: p.detach().clone() for name, p in case.model.adapter.named_parameters()}
    yield
    case.model.prepare_for_training()
    with torch.no_grad():
        for name, parameter in case.model.adapter.named_parameters():
            parameter.copy_(before[name])
            parameter.grad = None


def close(found: Tensor, expected: Tensor, tolerance: float = LOGITS) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def test_logits_and_loss(case: Case) -> None:
    output = case.model(input_ids=case.tokens, labels=case.labels, **case.visual)
    close(output.logits, case.expected["logits"])
    close(output.loss, case.expected["loss"])


def test_the_same_after_folding_for_inference(case: Case) -> None:
    case.model.prepare_for_inference()
    close(case.logits(), case.expected["logits"])


def test_features_and_visual_prompts(case: Case) -> None:
    if "clip_features" not in case.expected:
        pytest.skip("this variant reads no images")
    model, pixels = case.model, case.inputs["pixel_values"]
    from llama_adapter.families.vision import vision_features

    close(
        vision_features(model.vision, pixels, model.adapter_config), case.expected["clip_features"]
    )
    prompts = model.encode_visual(pixels)
    assert prompts is not None
    close(prompts.prompts_IMd, case.expected["visual_query"])


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_continuation(case: Case, use_cache: bool) -> None:
    expected = case.expected["greedy"]
    new = expected.shape[1]
    generated = case.model.generate(
        input_ids=case.tokens,
        attention_mask=torch.ones_like(case.tokens),
        max_new_tokens=new,
        do_sample=False,
        use_cache=use_cache,
        **case.visual,
    )
    assert torch.equal(generated[:, -new:], expected)


def test_the_last_position_from_a_cache(case: Case) -> None:
    last = case.expected.get("last_logits_inference", case.expected["logits"][:, -1])
    with torch.no_grad():
        start = case.model(input_ids=case.tokens[:, :-1], use_cache=True, **case.visual)
        end = case.model(input_ids=case.tokens[:, -1:], cache=start[CACHE], **case.visual)
    close(end.logits[:, -1], last)


@pytest.mark.parametrize("use_cache", [True, False])
def test_rows_of_different_length(case: Case, use_cache: bool) -> None:
    """Left-padded in one batch, each row continues as it would alone."""
    lengths = case.inputs.get("ragged_len", torch.tensor([9, 5])).tolist()
    longest = max(lengths)
    tokens = torch.zeros(len(lengths), longest, dtype=torch.long)
    for row, length in enumerate(lengths):
        tokens[row, longest - length :] = case.tokens[row, :length]
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "use_cache": use_cache}
    together = case.model.generate(
        input_ids=tokens, attention_mask=(tokens != 0).long(), **options, **case.visual
    )[:, longest:]
    if "greedy_ragged" in case.expected:
        assert torch.equal(together, case.expected["greedy_ragged"])
    for row, length in enumerate(lengths):
        visual = {k: v[row : row + 1] for k, v in case.visual.items()}
        alone = case.model.generate(
            input_ids=case.tokens[row : row + 1, :length], **options, **visual
        )
        assert torch.equal(alone[0, length:], together[row])


def test_the_gradient_of_every_parameter(case: Case) -> None:
    case.model(input_ids=case.tokens, labels=case.labels, **case.visual).loss.backward()
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in case.model.adapter.named_parameters()
    }
    official = {entry.official: entry.to_official(gradients) for entry in case.entries()}
    expected = {k.removeprefix("grad."): v for k, v in case.expected.items() if "grad." in k}
    assert len(expected) > 3
    assert expected.keys() <= official.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            official[name], gradient, rtol=0, atol=GRADIENTS, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_nothing_can_be_dropped(case: Case) -> None:
    """Every gate, bias, scale, norm, prompt, LoRA, alone."""
    norms = {
        f"{name}.weight": module.base_layer.weight
        for name, module in case.model.adapter.modules()
        if isinstance(module, LearnedNorm)
    }
    reference, small = case.logits(), []
    for name, parameter in case.model.adapter.named_parameters():
        kind = name.rsplit(".", 1)[1]
        neutral = norms.get(name, torch.full_like(parameter, kind in ("scale", "gate_scale")))
        is_final_chat_norm = torch.equal(parameter, neutral)
        if kind == "lora_down" or name.startswith("visual.") or is_final_chat_norm:
            continue
        before = parameter.detach().clone()
        with torch.no_grad():
            parameter.copy_(neutral)
            if (case.logits() - reference).abs().max() < MATTERS:
                small.append(name)
            parameter.copy_(before)
    assert small == []


@pytest.mark.parametrize("what", ["image", "channel swap", "other image", "projector"])
def test_the_picture_cannot_be_dropped(case: Case, what: str) -> None:
    if not case.visual:
        pytest.skip("this variant reads no images")
    reference, pixels = case.logits(), case.inputs["pixel_values"]
    with torch.no_grad():
        if what == "image":
            other = case.model(input_ids=case.tokens).logits
        elif what == "projector":
            for name, parameter in case.model.adapter.named_parameters():
                if ".blocks." in name:
                    parameter.zero_()
            other = case.logits()
        else:
            changed = pixels.flip(1) if what == "channel swap" else pixels.flip(0)
            other = case.model(input_ids=case.tokens, pixel_values=changed).logits
    assert (other - reference).abs().max() > MATTERS
    assert case.model.adapter_config.channel_order == "bgr"


def test_the_rotary_order_cannot_be_dropped(case: Case) -> None:
    """Biases and LoRA of rotated projections have to follow the weights' new order."""
    changed = False
    reference = case.logits()
    for name, parameter in case.model.adapter.named_parameters():
        if name.endswith(("q_proj.bias", "k_proj.bias", "q_proj.lora_up")):
            entry = next(e for e in case.entries() if e.ours == (name,))
            with torch.no_grad():
                parameter.copy_(entry.to_official({name: parameter}))
            changed = True
    if not changed:
        pytest.skip("this variant has nothing to reorder")
    assert (case.logits() - reference).abs().max() > MATTERS


def test_prompts_bypass_lora(case: Case) -> None:
    if not case.report.config.lora_rank:
        pytest.skip("this variant has no LoRA")
    attention, adaption = next(iter(case.model.adapter.prompts()))
    prompts = adaption.prompt.unsqueeze(0)
    keys, _ = adaption.project(attention, prompts)
    raw = attention.k_proj.base_layer(prompts).view(1, prompts.shape[1], keys.shape[1], -1)
    close(keys, raw.transpose(1, 2))
    assert (attention.k_proj(prompts).view_as(raw).transpose(1, 2) - keys).abs().max() > MATTERS


def test_v1_without_tanh_is_the_inference_code(case: Case, tmp_path: Path) -> None:
    if "notanh.greedy" not in case.expected:
        pytest.skip("only V1 has two gates in circulation")
    raw = make_case(case.source, tmp_path / "raw", gate="raw")
    close(raw.logits()[:, -1], case.expected["notanh.last_logits"])
    expected = case.expected["notanh.greedy"]
    generated = raw.model.generate(input_ids=raw.tokens, max_new_tokens=8, do_sample=False)
    assert torch.equal(generated[:, -expected.shape[1] :], expected)
    assert (raw.logits() - case.logits()).abs().max() > MATTERS


def test_the_settings_are_those_of_the_description(case: Case) -> None:
    meta = json.loads((case.source / "meta.json").read_text())
    config = case.report.config
    assert case.report.kind == meta["variant"].replace("chat-adapter", "chat")
    visual = meta.get("visual", {})
    length = visual.get("query_len", meta.get("adapter_len"))
    assert config.prompt_length == length
    if length:
        assert config.prompt_layers == visual.get("query_layer", meta.get("adapter_layer"))


def test_shards_of_model_parallel_training_are_joined(case: Case, tmp_path: Path) -> None:
    if not (case.source / "base_mp2").is_dir():
        pytest.skip("this variant has one shard only")
    import_released(
        case.source / "adapter.pth", base=case.source / "base_mp2", out=tmp_path / "joined"
    )
    joined = load_file(tmp_path / "joined" / "base" / "model.safetensors")
    single = load_file(case.directory / "base" / "model.safetensors")
    assert joined.keys() == single.keys()
    for name, tensor in single.items():
        torch.testing.assert_close(joined[name], tensor, rtol=0, atol=0)
