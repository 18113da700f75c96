"""The miniature world's decoder before training: a Llama wired for looking things up.

Trained from random weights, a decoder this small spends millions of tokens at "copy some
attribute from the passage". What it lacks are the circuits of looking up, which stock
weights can hold: heads that look a few tokens back, heads that look for earlier
occurrences of the own word, and a way for what they find to reach the output. We start
with rough versions of these and leave everything to training: which attribute is asked
for, what counts, how things compare.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tools.miniature.tokenizer import MAX_LENGTH


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainSettings:
    """Everything that decides the outcome of a run."""

    steps: int = 6800
    seed: int = 0
    documents: int = 16
    """Documents a step."""
    hidden_size: int = 160
    layers: int = 6
    intermediate_size: int = 384
    rope_theta: float = 10000.0
    gathering_layers: int = 2
    """First layers that see only their own segment in gathering steps."""
    gathering_share: float = 0.75
    """Share of steps in which they do."""
    matrix_lr: float = 0.02
    other_lr: float = 3e-3
    warmup_steps: int = 30
    rates: tuple[tuple[float, float], ...] = (
        (0.020, 1.0),
        (0.132, 0.4),
        (0.243, 0.13),
        (0.245, 0.3),
        (0.368, 0.0),
        (0.372, 0.3),
        (0.500, 0.0),
        (0.505, 0.4),
        (0.882, 0.0),
        (0.888, 0.3),
        (1.0, 0.0),
    )
    """Learning rates as shares of their peaks, at shares of the run, straight in between; each
    rise goes with a new stage of the course."""
    bfloat16: bool = True
    """Matrix products in bfloat16 (attention stays in float32, where CPUs are faster)."""


def _decoder_config(settings: PretrainSettings, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    heads = settings.hidden_size // 32
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=32,
        attention_bias=True,
        max_position_embeddings=MAX_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": settings.rope_theta},
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        use_cache=True,
    )


@torch.no_grad()
def _look_back(
    model: LlamaForCausalLM,
    layer: int,
    distances: Sequence[int],
    *,
    peak: float = 14.0,
    frequencies: int = 3,
) -> None:
    """Start the first heads of a layer looking the given numbers of tokens back.

    With zero query and key weights the biases alone make the scores, and rotary position
    turns them into a function of distance: q(d) rotated by -d meets k(0) best at d back.
    """
    config = model.config
    half = config.head_dim // 2
    attention = model.model.layers[layer].self_attn
    theta = config.rope_parameters["rope_theta"]
    amplitude = math.sqrt(peak * math.sqrt(config.head_dim) / frequencies)
    for head, distance in enumerate(distances):
        rows = slice(head * config.head_dim, (head + 1) * config.head_dim)
        attention.q_proj.weight[rows] = 0.0
        attention.k_proj.weight[rows] = 0.0
        for f in range(frequencies):
            angle = distance * theta ** (-f / half)
            row = head * config.head_dim + f
            attention.k_proj.bias[row] = amplitude
            attention.q_proj.bias[row] = amplitude * math.cos(angle)
            attention.q_proj.bias[row + half] = -amplitude * math.sin(angle)


@torch.no_grad()
def _look_up(
    model: LlamaForCausalLM, layer: int, generator: torch.Generator, *, pairs: int = 8
) -> None:
    """Start a layer copying what stands around earlier occurrences of the own word.

    The residual stream is parted: embeddings; one place for each head of the first layer,
    which writes there the word it looks back at; and a place for what is found. The h-th
    head of `layer` looks for tokens whose place h-1 holds the own word (head 0: the word
    itself) and copies the word found there (head 0: the few before it); the next layer,
    which looks back, passes it on, and the output embeddings read it. Only slowly rotating
    pairs of dimensions take part in the search, so that distance hardly matters.
    """
    config = model.config
    size, width, heads = config.head_dim, 2 * pairs, config.num_attention_heads
    room = config.hidden_size - (heads + 1) * width
    random_matrix = torch.randn(config.hidden_size, config.hidden_size, generator=generator)
    basis = torch.linalg.qr(random_matrix)[0].T
    embeddings = model.model.embed_tokens.weight
    embeddings.copy_(embeddings[:, :room] @ basis[:room] * (config.hidden_size / room) ** 0.5)
    word, found = basis[:width], basis[-width:]
    places = [basis[room + h * width : room + (h + 1) * width] for h in range(heads)]
    first, search, pass_on = (model.model.layers[i].self_attn for i in (0, layer, layer + 1))
    search.q_proj.weight.zero_()
    search.k_proj.weight.zero_()
    slow = torch.cat((torch.arange(size // 2 - pairs, size // 2), torch.arange(size - pairs, size)))
    for head in range(heads):
        rows = slice(head * size, head * size + width)
        first.v_proj.weight[rows] = word
        first.o_proj.weight[:, rows] = 0.5 * places[head].T
        search.q_proj.weight[head * size + slow] = 1.3 * word
        search.k_proj.weight[head * size + slow] = places[head - 1] if head else word
        search.v_proj.weight[rows] = word if head else 0.6 * sum(places[:4])
        search.o_proj.weight[:, rows] = 0.7 * found.T
        pass_on.v_proj.weight[rows] = found
        pass_on.o_proj.weight[:, rows] = found.T
    codes = F.normalize(embeddings @ word.T, dim=1)
    model.lm_head.weight += 2.0 * codes @ found


def build_decoder(
    settings: PretrainSettings, tokenizer: PreTrainedTokenizerFast
) -> LlamaForCausalLM:
    """A fresh decoder; the same one for the same settings."""
    generator = torch.Generator().manual_seed(settings.seed)
    model = LlamaForCausalLM(_decoder_config(settings, tokenizer))
    for name, parameter in model.named_parameters():
        if parameter.ndim != 2:
            parameter.data.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        std = 0.5 if "embed" in name else 0.7 * parameter.shape[1] ** -0.5
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            std *= 0.3
        parameter.data.normal_(std=std, generator=generator)
    heads = model.config.num_attention_heads
    _look_back(model, 0, range(1, heads + 1))
    _look_up(model, settings.gathering_layers, generator)
    _look_back(model, settings.gathering_layers + 1, range(1, heads + 1))
    return model
