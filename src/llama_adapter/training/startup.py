"""What would end a run at its start or at its first evaluation, found before data is opened.

Start-up and `--check` ask the same functions, so that neither finds what the other does not.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from llama_adapter.conversation import Conversation
from llama_adapter.data import SOURCES
from llama_adapter.data.caption_texts import CaptionTextOptions
from llama_adapter.errors import ConfigError, LlamaAdapterError, TrainingError
from llama_adapter.processing.encoding import encode, opening_ids
from llama_adapter.processing.processor import LlamaAdapterProcessor
from llama_adapter.training.device import require_quantizer, require_tracker, wants_cpu
from llama_adapter.training.held_out import CaptionScorer
from llama_adapter.training.memory import Sizes, sizes_of
from llama_adapter.training.recipe import Recipe


def faults_of(
    recipe: Recipe,
    processor: LlamaAdapterProcessor,
    sizes: Sizes | None,
    *,
    score_captions: CaptionScorer | None,
) -> Iterator[LlamaAdapterError]:
    """Every fault of the recipe; without `sizes` those that can be found without them."""
    steps: list[Callable[[], Any]] = [
        partial(wants_cpu, recipe),
        partial(require_tracker, recipe),
        partial(require_quantizer, recipe),
        partial(check_answers, recipe),
        partial(check_best, recipe, score_captions),
    ]
    if sizes is not None:
        steps += [partial(check_memory, sizes), partial(check_tokens, processor, sizes)]
    for step in steps:
        try:
            step()
        except LlamaAdapterError as error:
            yield error


def refuse_at_start(
    recipe: Recipe,
    processor: LlamaAdapterProcessor,
    *,
    score_captions: CaptionScorer | None,
    world: int,
) -> Sizes:
    """The recipe's sizes; raises the first LlamaAdapterError that prevents training."""
    for error in faults_of(recipe, processor, None, score_captions=score_captions):
        raise error
    sizes = sizes_of(recipe, world=world)
    for error in faults_of(recipe, processor, sizes, score_captions=score_captions):
        raise error
    return sizes


def check_answers(recipe: Recipe) -> None:
    """ConfigError for several answers behind one image in an attention without such masks."""
    if recipe.base.attention not in ("flash_attention_2", "flex_attention"):
        return
    for kind, section in recipe.streams.items():
        for number, source in enumerate(section.sources):
            options = source.options(SOURCES) if source.type in SOURCES else None
            if isinstance(options, CaptionTextOptions) and options.answers > 1:
                raise ConfigError(
                    f"{kind}s.sources.{number}.answers keeps answers apart by a mask, which "
                    f"base.attention {recipe.base.attention!r} does not take: use sdpa or eager"
                )


def check_best(recipe: Recipe, score_captions: CaptionScorer | None) -> None:
    """TrainingError where `evaluation.best` names a score that no evaluation will have.

    A scorer of captions that cannot say its `metrics` is asked at the first evaluation only.
    """
    best = None if recipe.evaluation is None else recipe.evaluation.best
    if best is None:
        return
    name, _, metric = best.rpartition(".")
    known = ["perplexity"]
    if recipe.held_out_kinds[name] == "caption" and score_captions is not None:
        metrics = getattr(score_captions, "metrics", None)
        if metrics is None:
            return
        known += metrics
    if metric not in known:
        raise TrainingError(
            f"evaluation.best names {best!r}, but the scores are "
            f"{', '.join(f'{name}.{one}' for one in known)}"
        )


def check_memory(sizes: Sizes) -> None:
    """ConfigError where what is trained alone exceeds this machine's memory.

    No GPU has more than the machine it is in.
    """
    if not hasattr(os, "sysconf"):  # Windows
        return
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    needed = sizes.trained_bytes + sizes.least_activation_bytes
    if needed > memory:
        trained = sum(sizes.trained_parameters.values())
        raise ConfigError(
            f"the recipe cannot fit: {trained} trained parameters with their optimizer and the "
            f"tokens of a micro-batch take at least {needed / 2**30:.1f} GiB, this machine has "
            f"{memory / 2**30:.1f} GiB"
        )


def check_tokens(processor: LlamaAdapterProcessor, sizes: Sizes) -> None:
    """ConfigError where the tokenizer has tokens in use that the base has no embedding of.

    Tokens beyond the embedding that are special and in no prompt are harmless: some text models
    are published with the tokenizer of their multimodal sisters.
    """
    tokenizer, rows = processor.tokenizer, sizes.embedding_rows
    special = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    used = {*range(rows, len(tokenizer))} - special
    used |= {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id} - {None}
    used |= set(tokenizer(processor.placeholder_text or "", add_special_tokens=False)["input_ids"])
    text = processor.render(Conversation.ask("a", answer="a"))
    used |= set(encode(text, tokenizer=tokenizer, opening=opening_ids(tokenizer)).input_ids)
    if used and max(used) >= rows:
        token = tokenizer.convert_ids_to_tokens(max(used))
        raise ConfigError(
            f"the tokenizer has the token {token!a} with id {max(used)}, but the base has "
            f"embeddings of {rows} tokens only: resize and save the base first"
        )


def check_positions(sizes: Sizes, longest: int, *, name: str) -> None:
    """ConfigError where a sample is longer than a base whose positions are a table."""
    if sizes.positions is not None and longest > sizes.positions:
        raise ConfigError(
            f"{name} has a sample of {longest} tokens, but the base has embeddings of "
            f"{sizes.positions} positions only: set row_length to {sizes.positions} at most"
        )
