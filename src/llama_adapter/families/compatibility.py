"""A family is adapted only if everything of ours does there what it should.

Every trainable must get a gradient, and samples that share a row must not change each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llama_adapter.errors import UnsupportedModelError
from llama_adapter.families.discovery import TOKEN, tracing, variables_of
from llama_adapter.families.offloading import execution_device
from llama_adapter.families.projections import RELATIVE_TOLERANCE, relative_difference
from llama_adapter.families.quantized import keep_unpacked
from llama_adapter.families.structure import family_of

ROUGH_TOLERANCE = 5e-2
"""The same for logits behind a whole model in a half type or quantized."""

ROUGH_LEAK = 1e-2
"""The same for what should not change at all: a mixture of experts still rounds differently."""


def check_trainables(
    language_model: PreTrainedModel,
    trainables: Iterable[tuple[str, Tensor]],
    run: Callable[[Tensor], Any],
) -> None:
    """Refuse a family in which something of an adapter would get no gradient.

    `run` passes one token through the adapted decoder. Costs that pass, and no memory for it.
    Raises UnsupportedModelError that names the family and the first such trainable.
    """
    device = execution_device(language_model.get_input_embeddings())
    if device.type == "meta" or torch.is_inference_mode_enabled():
        return
    wanted = list(trainables)
    with tracing(language_model, training=False):
        learned = variables_of(run(torch.full((1, 1), TOKEN, device=device)).logits)
    without = [name for name, tensor in wanted if id(tensor) not in learned]
    if without:
        raise UnsupportedModelError(
            f"{family_of(language_model)} cannot be adapted: {len(without)} of {len(wanted)} "
            f"trainables would get no gradient, such as {without[0]}"
        )


SAMPLE_LENGTH = 8
"""Tokens of each of the two samples of the packing check; more than any short convolution sees."""


@torch.no_grad()
def check_packing(language_model: PreTrainedModel) -> None:
    """Refuse a family that does not compute packed samples as it computes each alone.

    Two samples share a row, told apart by positions that restart, as in training. The second must
    not change with the first, and must be what it is in a row of its own.
    Raises UnsupportedModelError that names the family. Costs three passes of 16 tokens.
    """
    size = SAMPLE_LENGTH

    def logits(*samples: Tensor) -> Tensor:
        place = torch.arange(size, device=samples[0].device)
        output = language_model(
            input_ids=torch.cat(samples).unsqueeze(0),
            position_ids=place.repeat(len(samples)).unsqueeze(0),
            use_cache=False,
        )
        return output.logits[0, -size:]

    def compared(first: Tensor, other: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return logits(first, second), logits(second), logits(other, second)

    _refuse_mixing(
        language_model,
        compared,
        "cannot share a row between samples",
        "give each sample a row of its own (in a recipe, data.padding: padded)",
    )


@torch.no_grad()
def check_branches(language_model: PreTrainedModel) -> None:
    """Refuse a family that does not compute two branches of a prompt as it computes each alone.

    A mask [1, 1, T, T] tells them apart, and positions that go on from the prompt in each.
    Raises UnsupportedModelError that names the family. Costs three passes of 24 tokens.
    """
    size = SAMPLE_LENGTH

    def logits(*parts: Tensor) -> Tensor:
        device = parts[0].device
        place = torch.arange(2 * size, device=device)
        branch = torch.arange(len(parts), device=device).repeat_interleave(size)
        seen = ((branch == 0) | (branch[:, None] == branch)).tril()
        output = language_model(
            input_ids=torch.cat(parts).unsqueeze(0),
            attention_mask=mask_for(language_model, seen[None, None]),
            position_ids=torch.cat([place, *[place[size:]] * (len(parts) - 2)]).unsqueeze(0),
            use_cache=False,
        )
        return output.logits[0, -size:]

    def compared(first: Tensor, other: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        prompt = first.flip(0)
        together = logits(prompt, first, second)
        return together, logits(prompt, second), logits(prompt, other, second)

    _refuse_mixing(
        language_model,
        compared,
        "cannot learn several answers behind one prompt",
        "give each a prompt of its own (in a recipe, answers: 1)",
    )


def mask_for(language_model: PreTrainedModel, seen_B1TT: Tensor) -> Tensor:
    """A mask (bool, true where a token is seen) in the form that the base's attention takes.

    Raises UnsupportedModelError where it takes none, or where a layer sees less than the row.
    """
    config = language_model.config.get_text_config()
    implementation = str(config._attn_implementation)
    if not implementation.endswith(("eager", "sdpa")):
        raise UnsupportedModelError(
            f"{implementation.removeprefix('llama_adapter_')} attention takes no mask between "
            "tokens; set the attention implementation to sdpa"
        )
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    kinds = set(getattr(config, "layer_types", None) or ("sliding_attention",))
    if kinds != {"full_attention"} and any(w and w < seen_B1TT.shape[-1] for w in windows):
        raise UnsupportedModelError(
            f"{family_of(language_model)} sees {min(w for w in windows if w)} tokens in some "
            f"layers: a row with branches of {seen_B1TT.shape[-1]} tokens must not be longer"
        )
    if implementation.endswith("sdpa"):
        return seen_B1TT
    lowest = torch.finfo(language_model.dtype).min
    return torch.zeros_like(seen_B1TT, dtype=language_model.dtype).masked_fill(~seen_B1TT, lowest)


def _refuse_mixing(
    language_model: PreTrainedModel,
    compared: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]],
    cannot: str,
    instead: str,
) -> None:
    """Refuse what changes a sample with another one in its row.

    `compared` makes of two samples and a third the third's logits next to the first, alone, and
    next to the second.
    """
    device = execution_device(language_model.get_input_embeddings())
    if device.type == "meta":
        return
    vocabulary = int(language_model.config.get_text_config().vocab_size)
    # away from the special tokens, which mostly come first
    tokens = torch.arange(3 * SAMPLE_LENGTH, device=device) * 7 % max(vocabulary - 4, 1)
    tokens = (tokens + min(3, vocabulary - 1)).clamp(max=vocabulary - 1)
    was_training = [module for module in language_model.modules() if module.training]
    for module in was_training:
        module.training = False
    keep_unpacked(language_model)
    try:
        together, alone, next_to_other = compared(*tokens.split(SAMPLE_LENGTH))
        leaked = relative_difference(next_to_other, together)
    finally:
        for module in was_training:
            module.training = True
    rough = together.dtype != torch.float32 or getattr(language_model, "is_quantized", False)
    moved = relative_difference(together, alone)
    if not leaked <= (ROUGH_LEAK if rough else RELATIVE_TOLERANCE):
        reason = f"a sample changes with the one before it by {leaked:.2g} of its logits"
    elif not moved <= (ROUGH_TOLERANCE if rough else RELATIVE_TOLERANCE):
        reason = f"a sample differs from the same sample alone by {moved:.2g} of its logits"
    else:
        return
    raise UnsupportedModelError(f"{family_of(language_model)} {cannot}: {reason}; {instead}")
