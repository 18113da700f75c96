"""Backward passes of our own give what autograd derives from the formula."""

from __future__ import annotations

import functools

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from llama_adapter.model.fast.attention import attention
from llama_adapter.model.fast.rms_norm import rms_epsilon
from llama_adapter.model.loss import answer_loss
from llama_adapter.model.scaled_linear import LearnedNorm, ScaledLinear

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def _random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _close(found, expected, dtype):
    scale = expected.abs().max().item()
    assert_close(found, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * scale)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_bias_and_scale(bias, watched, dtype):
    base = nn.Linear(6, 5, bias=bias).to(dtype).requires_grad_(False)
    if watched:
        base.register_forward_pre_hook(lambda _base, _inputs: None)
    module = ScaledLinear(base)
    with torch.no_grad():
        module.scale.copy_(_random(5))
        module.adapter_bias.copy_(_random(5, seed=1))
    gradient = _random(2, 3, 5, dtype=dtype, seed=3)
    found, expected = [], []
    for results, forward in (
        (found, module),
        (expected, lambda x: (module.scale * (base(x) + module.adapter_bias)).to(dtype)),
    ):
        x = _random(2, 3, 6, dtype=dtype, seed=2).requires_grad_()
        # the output is kept: its place must not be written over by the backward pass
        y = forward(x)
        results.append(y.detach())
        results += torch.autograd.grad(y, (x, module.scale, module.adapter_bias), gradient)
    for ours, theirs in zip(found, expected, strict=True):
        _close(ours, theirs, dtype)


@pytest.mark.parametrize(
    "watch",
    [
        "register_forward_pre_hook",
        "register_forward_hook",
        "register_full_backward_pre_hook",
        "register_full_backward_hook",
    ],
)
def test_whoever_watches_the_frozen_linear_sees_it_learn_with(watch):
    base = nn.Linear(6, 5, bias=False).requires_grad_(False)
    calls = []
    getattr(base, watch)(lambda *_: calls.append(watch))
    ScaledLinear(base)(_random(3, 6).requires_grad_()).sum().backward()
    assert calls == [watch]


def test_an_offloaded_linear_fetches_its_numbers_while_it_learns():
    base = nn.Linear(6, 5, bias=False).requires_grad_(False)
    base.forward = lambda x: x[..., :5] * 2.0
    y = ScaledLinear(base)(_random(3, 6).requires_grad_())
    assert_close(y, _random(3, 6)[:, :5] * 2.0, rtol=0, atol=0)


class _OneProduct(torch.Tensor):
    """A weight of a class of its own, as some quantisers make them: linears are all it can do."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            return args[0] * 2.0
        if "matmul" in func.__name__ or func.__name__ == "mm":
            raise NotImplementedError(func)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_weight_of_another_class_makes_its_own_product():
    base = nn.Linear(6, 6, bias=False).requires_grad_(False)
    weight = torch.Tensor._make_subclass(_OneProduct, base.weight.data)
    base.weight = nn.Parameter(weight, requires_grad=False)
    x = _random(3, 6).requires_grad_()
    ScaledLinear(base)(x).sum().backward()
    assert_close(x.grad, torch.full((3, 6), 2.0), rtol=0, atol=0)


def test_a_weight_that_moves_between_the_passes_learns_with_what_it_was():
    base = nn.Linear(6, 5, bias=False).requires_grad_(False)
    x, weight = _random(3, 6).requires_grad_(), base.weight.detach().clone()
    y = ScaledLinear(base)(x)
    base.to(torch.bfloat16)
    y.sum().backward()
    assert_close(x.grad, weight.sum(0).expand(3, -1))


def test_bias_and_scale_learn_where_a_checkpoint_keeps_products():
    module = ScaledLinear(nn.Linear(6, 5, bias=False).requires_grad_(False))
    nn.init.constant_(module.scale, 3.0)
    keeps = functools.partial(
        create_selective_checkpoint_contexts, lambda *_a, **_k: CheckpointPolicy.MUST_SAVE
    )
    gradients = []
    for run in (
        lambda x: module(x).sin(),
        lambda x: checkpoint(lambda v: module(v).sin(), x, use_reentrant=False, context_fn=keeps),
    ):
        x = _random(2, 3, 6).requires_grad_()
        inputs = (x, module.scale, module.adapter_bias)
        gradients.append(torch.autograd.grad(run(x).sum(), inputs))
    for ours, theirs in zip(*gradients, strict=True):
        assert_close(ours, theirs, rtol=0, atol=0)


def test_a_linear_without_numbers_tells_its_shape():
    module = ScaledLinear(nn.Linear(6, 5, bias=False).requires_grad_(False)).to("meta")
    assert module(_random(3, 6).to("meta").requires_grad_()).shape == (3, 5)


def test_a_frozen_linear_made_to_learn_does():
    base = nn.Linear(6, 5)
    ScaledLinear(base)(_random(3, 6).requires_grad_()).sum().backward()
    assert base.weight.grad is not None
    assert base.bias.grad is not None


def test_bias_and_scale_learn_under_autocast():
    module = ScaledLinear(nn.Linear(6, 5).requires_grad_(False))
    x = _random(3, 6).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    for parameter in (x, module.scale, module.adapter_bias):
        assert parameter.grad.abs().sum() > 0
        assert parameter.grad.dtype == torch.float32


def test_a_scale_of_zero_gets_no_gradient():
    module = ScaledLinear(nn.Linear(6, 5).requires_grad_(False))
    nn.init.zeros_(module.scale)
    module(_random(3, 6).requires_grad_()).sum().backward()
    assert_close(module.scale.grad, torch.zeros(5), rtol=0, atol=0)
    assert_close(module.adapter_bias.grad, torch.zeros(5), rtol=0, atol=0)


def test_an_rms_norm_is_known_by_what_it_computes():
    assert rms_epsilon(LlamaRMSNorm(8, eps=1e-5)) == 1e-5
    assert rms_epsilon(nn.RMSNorm(8, eps=1e-5)) == 1e-5
    assert rms_epsilon(Gemma3RMSNorm(8)) is None  # (1 + w) ⊙ x / √(…)
    assert rms_epsilon(nn.LayerNorm(8, bias=False)) is None


@pytest.mark.parametrize("norm", [LlamaRMSNorm, Gemma3RMSNorm, nn.LayerNorm])
def test_a_merged_norm_computes_the_same(norm):
    module = LearnedNorm(norm(8))
    with torch.no_grad():
        module.weight.copy_(_random(8))
    merged = module.merged()
    assert isinstance(merged, nn.RMSNorm if norm is LlamaRMSNorm else norm)
    assert not any(p.requires_grad for p in merged.parameters())
    x = 3 * _random(2, 3, 8, seed=1)
    assert_close(merged(x), module(x), rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("error")
def test_a_merged_norm_takes_what_autocast_gives_it():
    module = LearnedNorm(LlamaRMSNorm(8))
    x = _random(2, 3, 8, dtype=torch.bfloat16)
    assert_close(module.merged()(x), module(x), rtol=0, atol=0)


def test_a_merged_norm_goes_on_moving_its_input():
    class Moved(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            return tuple(2 * x for x in args), kwargs

    norm = LlamaRMSNorm(8)
    norm.variance_epsilon = 10.0  # large, so that twice the input is another output
    module = LearnedNorm(add_hook_to_module(norm, Moved()))
    x = _random(2, 8)
    assert module.rms_epsilon is not None
    assert_close(module.merged()(x), norm(x), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(norm(x), LlamaRMSNorm.forward(norm, x))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rms_norm(dtype):
    module = LearnedNorm(LlamaRMSNorm(8))
    assert module.rms_epsilon is not None
    with torch.no_grad():
        module.weight.copy_(_random(8))
    gradient = _random(2, 3, 8, dtype=dtype, seed=2)
    found, expected = [], []
    for results, forward in ((found, module), (expected, lambda x: module.norm(x).to(dtype))):
        x = (3 * _random(2, 3, 8, seed=1)).to(dtype).requires_grad_()
        y = forward(x)
        results.append(y.detach())
        results += torch.autograd.grad(y, (x, module.weight), gradient)
    assert_close(found[0], expected[0], rtol=0, atol=0)
    for ours, theirs in zip(found, expected, strict=True):
        _close(ours, theirs, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_loss(dtype):
    labels = torch.tensor([[3, -100, 5, 7], [-100, -100, 0, 1]])
    targets = F.pad(labels[:, 1:], (0, 1), value=-100)
    logits = _random(2, 4, 11, dtype=dtype).requires_grad_()
    loss = answer_loss(logits, labels)
    expected = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
    assert_close(loss, expected)
    (found,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (wanted,) = torch.autograd.grad(expected, logits)
    _close(found, wanted, dtype)
    (again,) = torch.autograd.grad(loss, logits)
    assert_close(again, found, rtol=0, atol=0)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("heads_together", [True, False])
@pytest.mark.parametrize("learn", [(0, 1, 2), (0,), (0, 1), (0, 2), (1, 2)])
def test_rows_that_read_one_prompt_together_read_it_alike(learn, heads_together, softcap):
    query = _random(3, 7, 4, 8).transpose(1, 2)
    query = query if heads_together else query.contiguous()
    inputs = [query, _random(1, 4, 5, 8, seed=1), _random(1, 4, 5, 8, seed=2)]
    learning = [inputs[i].requires_grad_() for i in learn]
    gradient = _random(3, 4, 7, 8, seed=3)
    together = attention(*inputs, scale=0.3, softcap=softcap)
    rows = [x.expand(3, -1, -1, -1) for x in inputs[1:]]
    apart = attention(query, *rows, scale=0.3, softcap=softcap)
    assert_close(together, apart)
    for ours, theirs in zip(
        torch.autograd.grad(together, learning, gradient),
        torch.autograd.grad(apart, learning, gradient),
        strict=True,
    ):
        assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
