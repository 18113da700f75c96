"""Drawing the next token of each row, as its own request asks.

A row's draws depend on its own logits and seed alone, never on other rows.

Shapes: N rows, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llama_adapter.generation.requests import Sampling, TokenLogprob
from llama_adapter.generation.settings import GenerationSettings


@dataclass(kw_only=True)
class Drawer:
    """What draws one answer's tokens."""

    sampling: Sampling
    choice: int = 0
    matcher: Any = None
    """A grammar's state, of `generation.grammar`."""
    penalty: float = 1.0
    """The base's own penalty on tokens that are there already."""
    seen: list[int] = field(default_factory=list)
    """The tokens that are there already, the prompt's included; kept where they are penalized."""
    random: random.Random = field(init=False)

    def __post_init__(self) -> None:
        seed = self.sampling.seed
        self.random = random.Random(None if seed is None else f"{seed} {self.choice}")

    @property
    def is_greedy(self) -> bool:
        sampling = self.sampling
        settings = GenerationSettings(temperature=sampling.temperature)
        return not settings.as_keywords()["do_sample"]

    @property
    def binds(self) -> bool:
        """Whether it changes the logits that it draws from."""
        return self.matcher is not None or self.penalty != 1

    def take(self, token: int) -> None:
        """Go on behind a token."""
        if self.penalty != 1:
            self.seen.append(token)
        if self.matcher is not None:
            self.matcher.take(token)


def draw(logits_NV: Tensor, drawers: Sequence[Drawer]) -> list[int]:
    """The next token of each row; the logits of rows that a grammar or penalty binds change."""
    for logits_V, drawer in zip(logits_NV, drawers, strict=True):
        if drawer.penalty != 1:
            _penalize(logits_V, drawer)
        if drawer.matcher is not None:
            drawer.matcher.restrict(logits_V)
    tokens: list[int] = logits_NV.argmax(-1).tolist()
    sampled = [i for i, drawer in enumerate(drawers) if not drawer.is_greedy]
    if sampled:
        rows = logits_NV[sampled].float()
        for i, token in zip(sampled, _sample(rows, [drawers[i] for i in sampled]), strict=True):
            tokens[i] = token
    return tokens


def _penalize(logits_V: Tensor, drawer: Drawer) -> None:
    """As transformers' `repetition_penalty`."""
    seen = torch.tensor(drawer.seen, device=logits_V.device)
    found = logits_V[seen]
    logits_V[seen] = torch.where(found < 0, found * drawer.penalty, found / drawer.penalty)


def _sample(logits_NV: Tensor, drawers: Sequence[Drawer]) -> list[int]:
    """Temperature, then the likeliest k, then the nucleus, then those above min_p, then a draw."""

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, device=logits_NV.device).unsqueeze(1)

    samplings = [drawer.sampling for drawer in drawers]
    scores_NV, token_NV = logits_NV.sort(dim=-1, descending=True)
    scores_NV = scores_NV / column([s.temperature for s in samplings])
    vocabulary = scores_NV.shape[1]
    top_k = column([s.top_k or vocabulary for s in samplings])
    place_V = torch.arange(vocabulary, device=scores_NV.device)
    scores_NV = scores_NV.masked_fill(place_V >= top_k, -torch.inf)
    p_NV = scores_NV.softmax(-1)
    before_NV = p_NV.cumsum(-1) - p_NV
    top_p = column([s.top_p for s in samplings])
    # the likeliest token always stays; with top_p 1, rounding must not drop the last ones
    is_out_NV = (before_NV >= top_p) & (top_p < 1) & (place_V > 0)
    is_out_NV |= p_NV < column([s.min_p for s in samplings]) * p_NV[:, :1]
    p_NV = p_NV.masked_fill(is_out_NV, 0)
    sum_NV = p_NV.cumsum(-1)
    drawn = column([drawer.random.random() for drawer in drawers]) * sum_NV[:, -1:]
    # the first token up to which the sum is larger; rounding may put none above the last sum
    last_N1 = (p_NV > 0).sum(-1, keepdim=True) - 1
    place_N1 = torch.searchsorted(sum_NV, drawn, right=True).minimum(last_N1)
    tokens: list[int] = token_NV.gather(1, place_N1).squeeze(1).tolist()
    return tokens


def log_probabilities(
    logits_NV: Tensor, tokens: Sequence[int], samplings: Sequence[Sampling]
) -> list[TokenLogprob]:
    """Each row's token, with log-probabilities where its request wants them."""
    wanted = [i for i, sampling in enumerate(samplings) if sampling.logprobs]
    found = [TokenLogprob(token=token) for token in tokens]
    if not wanted:
        return found
    logprobs_NV = logits_NV[wanted].float().log_softmax(-1)
    for i, logprobs_V in zip(wanted, logprobs_NV, strict=True):
        top, top_tokens = logprobs_V.topk(min(samplings[i].top_logprobs, len(logprobs_V)))
        found[i] = TokenLogprob(
            token=tokens[i],
            logprob=float(logprobs_V[tokens[i]]),
            top=tuple(zip(top_tokens.tolist(), top.tolist(), strict=True)),
        )
    return found
