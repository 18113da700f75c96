"""Pretrain the miniature world's decoder: a `LlamaForCausalLM` that reads, text only.

    python -m tools.miniature.decoder --out DIR [--resume]

What makes a decoder this small learn to look things up within minutes:

- It starts with rough circuits of looking up: see `wiring`.
- In most steps the first layers see only their own segment: the passage, or one question.
  Facts must then be gathered on the passage's own tokens before later layers look them
  up, which leaves room for other tokens to take the passage's place in those layers.
- Early documents ask for single attributes and say every fact twice, in opposite orders.
- Only foreseeable text has full weight in the loss; matrices are trained with Muon.

Data of a step depend on seed and step alone, and nothing else is random after the start:
a resumed run continues bit for bit.
"""

from __future__ import annotations

import argparse
import functools
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, LlamaForCausalLM, PreTrainedTokenizerFast

from llama_adapter.files import atomic_file
from llama_adapter.miniature.captions import describe_tasks, passage
from llama_adapter.miniature.questions import ONE_WORD_TYPES, QUESTION_TYPES, ask
from llama_adapter.miniature.scenes import Split, sample_scene
from llama_adapter.training.muon import Muon
from tools.miniature.masking import unscored_tokens, without_unscored
from tools.miniature.pretraining_text import Document, Piece, course, sample_document
from tools.miniature.tokenizer import build_tokenizer
from tools.miniature.wiring import PretrainSettings, build_decoder

_ATTENTION = "miniature_pretraining"


def _segmented_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001  (rows are padded on the right: causal is enough)
    scaling: float,
    gathering_mask: Tensor | None = None,
    gathering_layers: int = 0,
    **kwargs: object,  # noqa: ARG001
) -> tuple[Tensor, None]:
    """Causal attention in float32; the first layers may be held to a mask of segments."""
    held = gathering_mask is not None and module.layer_idx < gathering_layers
    with torch.autocast("cpu", enabled=False):
        out = F.scaled_dot_product_attention(
            query.float(),
            key.float(),
            value.float(),
            attn_mask=gathering_mask if held else None,
            is_causal=not held,
            scale=scaling,
        )
    return out.transpose(1, 2).contiguous(), None


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Documents as tokens, padded on the right."""

    tokens: Tensor
    weights: Tensor
    """Weight of each token in the loss."""
    segments: Tensor
    unscored: Tensor
    """The token left out of the softmax where a token is predicted, -1: none (`masking`)."""


def collate(documents: Sequence[Document], tokenizer: PreTrainedTokenizerFast) -> Batch:
    rows = []
    for document in documents:
        pieces = document.pieces
        ids, weights, segments = [tokenizer.bos_token_id], [0.0], [0]
        encoded = tokenizer.backend_tokenizer.encode_batch(
            [p.text for p in pieces], add_special_tokens=False
        )
        for piece, encoding in zip(pieces, encoded, strict=True):
            ids += encoding.ids
            weights += [piece.weight] * len(encoding.ids)
            segments += [piece.segment] * len(encoding.ids)
        rows.append(([*ids, tokenizer.eos_token_id], [*weights, 0.1], [*segments, segments[-1]]))
    length = max(len(ids) for ids, _, _ in rows)

    def padded(column: int, fill: float) -> Tensor:
        return torch.tensor([row[column] + [fill] * (length - len(row[0])) for row in rows])

    tokens = padded(0, tokenizer.pad_token_id)
    return Batch(
        tokens=tokens,
        weights=padded(1, 0.0),
        segments=padded(2, -1),
        unscored=unscored_tokens(tokens, [d.scene for d in documents], tokenizer),
    )


def weighted_loss(model: LlamaForCausalLM, batch: Batch, *, gathering_layers: int = 0) -> Tensor:
    """Mean cross-entropy over tokens, by weight."""
    tokens, segments = batch.tokens[:, :-1], batch.segments[:, :-1]
    mask = None
    if gathering_layers:
        length = tokens.shape[1]
        same = segments[:, None, :, None] == segments[:, None, None, :]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        mask = torch.zeros(same.shape).masked_fill(~(same & causal), -1e9)
    logits = model(
        input_ids=tokens, gathering_mask=mask, gathering_layers=gathering_layers, use_cache=False
    ).logits
    weights = batch.weights[:, 1:].flatten()
    logits = without_unscored(logits.float(), batch.unscored[:, 1:])
    losses = F.cross_entropy(logits.flatten(0, 1), batch.tokens[:, 1:].flatten(), reduction="none")
    return (losses * weights).sum() / weights.sum()


class DecoderPretraining:
    """A run: the decoder, its optimizers and the number of steps done."""

    def __init__(self, settings: PretrainSettings) -> None:
        AttentionInterface.register(_ATTENTION, _segmented_attention)
        self.settings = settings
        self.tokenizer = build_tokenizer()
        self.model = build_decoder(settings, self.tokenizer)
        self.model.set_attn_implementation(_ATTENTION)
        self.step_count = 0
        self.token_count = 0
        self.seconds = 0.0
        named = list(self.model.named_parameters())
        matrices = [p for n, p in named if p.ndim == 2 and "layers" in n]
        others = [p for n, p in named if p.ndim != 2 or "layers" not in n]
        self.optimizers: tuple[torch.optim.Optimizer, ...] = (
            Muon(matrices, lr=settings.matrix_lr, weight_decay=0.01),
            torch.optim.AdamW(others, lr=settings.other_lr, betas=(0.9, 0.98), weight_decay=0.0),
        )

    def _learning_rate_factor(self) -> float:
        done = self.step_count / self.settings.steps
        points = ((0.0, 1.0), *self.settings.rates)
        rate = next(
            low + (high - low) * (done - start) / (end - start)
            for (start, low), (end, high) in pairwise(points)
            if done <= end
        )
        return min(rate, (self.step_count + 1) / self.settings.warmup_steps)

    def step(self) -> float:
        """One optimizer step; the loss."""
        started = time.perf_counter()
        s = self.settings
        rng = random.Random(f"{s.seed}/{self.step_count}")
        curriculum = course(self.step_count / s.steps)
        batch = collate(
            [sample_document(rng, curriculum) for _ in range(s.documents)], self.tokenizer
        )
        gathering = s.gathering_layers if rng.random() < s.gathering_share else 0
        with torch.autocast("cpu", torch.bfloat16, enabled=s.bfloat16):
            loss = weighted_loss(self.model, batch, gathering_layers=gathering)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        factor = self._learning_rate_factor()
        for optimizer, rate in zip(self.optimizers, (s.matrix_lr, s.other_lr), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step_count += 1
        self.token_count += int((batch.segments >= 0).sum())
        self.seconds += time.perf_counter() - started
        return float(loss.detach())

    def state_dict(self) -> dict[str, Any]:
        return {
            "settings": asdict(self.settings),
            "step_count": self.step_count,
            "token_count": self.token_count,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
        }

    def save(self, path: Path) -> None:
        """Write a checkpoint; a crash leaves the previous one whole."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            torch.save(self.state_dict(), file)

    @classmethod
    def load(cls, path: Path) -> DecoderPretraining:
        """Continue from a checkpoint, with the settings it was made with."""
        state = torch.load(path, weights_only=True)
        run = cls(PretrainSettings(**state["settings"]))
        run.model.load_state_dict(state["model"])
        for optimizer, saved in zip(run.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        run.step_count, run.token_count = state["step_count"], state["token_count"]
        run.seconds = state["seconds"]
        return run

    def export(self, out: Path) -> None:
        """Write the decoder and its tokenizer as a stock Hugging Face directory."""
        self.model.set_attn_implementation("sdpa")
        self.model.save_pretrained(out)
        self.tokenizer.save_pretrained(out)
        self.model.set_attn_implementation(_ATTENTION)


READING_TASKS = (*QUESTION_TYPES, "one_word", "describe")
"""What reading is measured on: the question types, short answers and descriptions."""


def _reading_document(rng: random.Random, task: str, *, split: Split, repeats: float) -> Document:
    """A passage, a question and its answer; the answer alone has weight."""
    while True:
        scene = sample_scene(rng, split=split)
        if task == "describe":
            describe = rng.choice(describe_tasks())
            question, answer = rng.choice(describe.instructions), describe.write(scene, rng)
            break
        short = task == "one_word"
        asked = ask(scene, rng, rng.choice(ONE_WORD_TYPES) if short else task, one_word=short)
        if asked is not None:
            question, answer = asked.question, asked.answer
            break
    text = f"{passage(scene, rng, repeats=repeats)} question: {question} answer:"
    question_piece = Piece(text=text, weight=0.0, segment=0)
    return Document(pieces=(question_piece, Piece(text=answer, weight=1.0, segment=0)))


@torch.no_grad()
def reading_accuracy(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int = 1,
    count: int = 40,
    split: Split = Split.TEST,
    repeats: float = 0.5,
) -> dict[str, float]:
    """Share of questions about passages answered exactly (greedily), by task."""
    rng = random.Random(f"reading/{seed}")
    accuracy = {}
    for task in READING_TASKS:
        documents = [
            _reading_document(rng, task, split=split, repeats=repeats) for _ in range(count)
        ]
        batch = collate(documents, tokenizer)
        answers = batch.weights[:, 1:] == 1.0
        predicted = model(input_ids=batch.tokens[:, :-1], use_cache=False).logits.argmax(-1)
        right = ((predicted == batch.tokens[:, 1:]) | ~answers).all(1)
        accuracy[task] = right.float().mean().item()
    return accuracy


def pretrain_decoder(
    out: Path,
    *,
    settings: PretrainSettings,
    resume: bool = False,
    report_every: int = 50,
    evaluate_every: int = 200,
    report: Callable[[str], None] = print,
) -> dict[str, float]:
    """Pretrain a decoder and save it, with its tokenizer, in `out`.

    `checkpoint.pt` in `out` is replaced by a newer one now and then, never by a
    half-written one; with `resume` a run goes on from there, with the settings it began
    with. Returns the accuracy of reading, by question type, on test scenes.
    """
    checkpoint = out / "checkpoint.pt"
    if resume and checkpoint.exists():
        run = DecoderPretraining.load(checkpoint)
        report(f"resumed at step {run.step_count} of {run.settings.steps}")
    else:
        run = DecoderPretraining(settings)
    average = None
    while run.step_count < run.settings.steps:
        loss = run.step()
        average = loss if average is None else 0.95 * average + 0.05 * loss
        if run.step_count % report_every == 0:
            report(
                f"step {run.step_count} of {run.settings.steps}: loss {average:.4f}, "
                f"{run.token_count / 1e6:.2f}M tokens, {run.seconds / 60:.1f} minutes, "
                f"{run.token_count / run.seconds:.0f} tokens/s"
            )
        if run.step_count % evaluate_every == 0:
            run.save(checkpoint)
            report(_as_line(reading_accuracy(run.model, run.tokenizer)))
    run.save(checkpoint)
    run.export(out)
    accuracy = reading_accuracy(run.model, run.tokenizer, count=200)
    report(_as_line(accuracy))
    return accuracy


def _as_line(accuracy: dict[str, float]) -> str:
    return "exact match: " + ", ".join(f"{k} {v:.3f}" for k, v in accuracy.items())


def main(arguments: Sequence[str] | None = None) -> None:
    """Pretrain from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.miniature.decoder",
        description="Pretrain the decoder of the miniature world.",
    )
    parser.add_argument("--out", type=Path, required=True, help="where decoder and state go")
    parser.add_argument("--steps", type=int, default=PretrainSettings().steps)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads for torch")
    parser.add_argument("--resume", action="store_true", help="go on from DIR/checkpoint.pt")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    pretrain_decoder(
        options.out,
        settings=PretrainSettings(steps=options.steps, seed=options.seed),
        resume=options.resume,
        report=functools.partial(print, file=sys.stderr, flush=True),
    )


if __name__ == "__main__":
    main()
