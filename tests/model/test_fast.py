"""What runs fast gives what the plain code gives, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from llama_adapter.model import answer_mask
from llama_adapter.model.fast.attention import FEW_TOKENS, attention
from llama_adapter.model.fast.cross_entropy import summed_cross_entropy
from llama_adapter.model.fast.rms_norm import rms_epsilon, rms_norm
from llama_adapter.model.fast.scale import scale_and_shift
from llama_adapter.model.fast.switch import switched_off

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def _random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _norm(x, weight):
    norm = LlamaRMSNorm(8)
    epsilon = rms_epsilon(norm)
    del norm.weight
    norm.weight = weight  # not a parameter of its own: its gradient is that of the input
    return rms_norm(norm, x, epsilon=epsilon)


QUERY, KEYS = _random(3, 4, 7, 8), _random(3, 4, 5, 8, seed=1)
MASK = _random(3, 1, 7, 5, seed=2) > 0
MASK[..., 0] = True
TARGETS = torch.tensor([3, -100, 0, 10, 7, -100])

CASES = {
    "scale": (lambda y, s: scale_and_shift(y, s, None), (_random(3, 5), _random(5, seed=1))),
    "shift": (lambda y, b: scale_and_shift(y, None, b), (_random(3, 5), _random(5, seed=1))),
    "scale and shift": (
        scale_and_shift,
        (_random(2, 3, 5), _random(5, seed=1), _random(5, seed=2)),
    ),
    "no token": (scale_and_shift, (_random(0, 5), _random(5, seed=1), _random(5, seed=2))),
    "attention": (attention, (QUERY, KEYS, KEYS.flip(0))),
    "attention, shared keys": (attention, (QUERY, KEYS[:1], KEYS[1:2])),
    "attention, few tokens": (
        attention,
        (QUERY.flatten()[: FEW_TOKENS * 32].view(1, 4, FEW_TOKENS, 8), KEYS[:1], KEYS[1:2]),
    ),
    "attention, mask": (lambda q, k, v: attention(q, k, v, mask=MASK), (QUERY, KEYS, KEYS)),
    "attention, softcap": (
        lambda q, k, v: attention(q, k, v, scale=0.7, softcap=2.0),
        (QUERY, KEYS[:1], KEYS[1:2]),
    ),
    "attention, many keys": (
        attention,
        (QUERY, _random(3, 4, 200, 8, seed=3), _random(3, 4, 200, 8, seed=4)),
    ),
    "norm": (_norm, (3 * _random(2, 3, 8), _random(8, seed=1))),
    "cross-entropy": (lambda logits: summed_cross_entropy(logits, TARGETS), (_random(6, 11),)),
}
LEARNED = {"scale", "shift", "scale and shift", "no token", "norm"}
"""Cases whose further inputs are parameters, which stay in float32."""


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES)
def test_fast_is_plain(case, dtype):
    function, given = CASES[case]
    results = []
    for is_fast in (True, False):
        inputs = [
            x.detach().to(dtype if i == 0 or case not in LEARNED else x.dtype).requires_grad_()
            for i, x in enumerate(given)
        ]
        if is_fast:
            output = function(*inputs)
            with torch.no_grad():
                # without gradients other code may run, and it computes the same
                alone = function(*inputs)
        else:
            with switched_off():
                output = alone = function(*inputs)
        gradient = _random(*output.shape, seed=9).to(output.dtype)
        results.append((output, alone, *torch.autograd.grad(output, inputs, gradient)))
    for fast, plain in zip(*results, strict=True):
        assert fast.dtype == plain.dtype
        size = plain.abs().max().item() if plain.numel() else 0.0
        assert_close(fast, plain, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * size)


@pytest.mark.parametrize("case", ["scale and shift", "norm", "cross-entropy"])
def test_the_switch_turns_custom_backward_passes_off(case):
    function, given = CASES[case]
    inputs = [x.detach().clone().requires_grad_() for x in given]

    def is_custom(output):
        found, seen = [output.grad_fn], []
        while found:
            node = found.pop()
            if node is not None:
                seen.append(type(node).__module__)
                found += [following for following, _ in node.next_functions]
        return any(module.startswith("llama_adapter") or module == "torch.autograd.function"
                   for module in seen)  # fmt: skip

    assert is_custom(function(*inputs))
    with switched_off():
        assert not is_custom(function(*inputs))
    assert is_custom(function(*inputs))


@pytest.mark.parametrize("preset", ["v1", "v2", "v1-multimodal", "released-v2-chat"])
def test_a_model_learns_the_same_without_it(build, ids, pictures, preset):
    overrides = {"prompt_length": 0} if preset == "released-v2-chat" else {}
    model = build(preset, **overrides)
    labels = ids.masked_fill(ids % 3 == 0, -100)
    inputs = {"labels": labels, "logits_to_keep": answer_mask(labels)}
    if model.adapter_config.is_multimodal:
        inputs["pixel_values"] = pictures
    found = []
    for context in (None, switched_off()):
        model.zero_grad()
        if context is None:
            model(ids, **inputs).loss.backward()
        else:
            with context:
                model(ids, **inputs).loss.backward()
        found.append({n: p.grad.clone() for n, p in model.adapter.named_parameters()})
    for name, gradient in found[0].items():
        scale = found[1][name].abs().max().item()
        assert_close(gradient, found[1][name], rtol=1e-3, atol=1e-4 * scale + 1e-9)
