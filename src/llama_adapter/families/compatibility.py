"""A family is adapted only if everything of ours does there what it should.

Keys and values of a prompt must be those that the family's own attention would make, and visual
prompts given to the model must arrive at its attention.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llama_adapter.errors import UnsupportedModelError
from llama_adapter.families.offloading import execution_device
from llama_adapter.families.probing import capture_keys_values, visual_prompts_arrive
from llama_adapter.families.projections import KeysValues, project_prompt
from llama_adapter.families.quantized import keep_unpacked
from llama_adapter.families.structure import Attention, family_of

RELATIVE_TOLERANCE = 1e-3
"""Of the largest number compared; the same products in another order differ by far less."""

ROUGH_TOLERANCE = 5e-2
"""The same for logits behind a whole model in a half type or quantized."""

ROUGH_LEAK = 1e-2
"""The same for what should not change at all: a mixture of experts still rounds differently."""


def check_projections(
    language_model: PreTrainedModel, attentions: list[tuple[str, Attention]]
) -> None:
    """Refuse a family whose keys and values of a prompt we would compute differently.

    Raises UnsupportedModelError that names the family and the module.
    """
    for name, attention in attentions:
        if execution_device(attention).type == "meta":
            continue
        difference = oracle_difference(language_model, attention, name=name)
        if not difference <= RELATIVE_TOLERANCE:
            raise UnsupportedModelError(
                f"{family_of(language_model)} cannot be adapted: keys and values of a prompt in "
                f"{name} would differ from the module's own by {difference:.2g} of their size"
            )


@torch.no_grad()
def oracle_difference(
    language_model: PreTrainedModel, attention: Attention, *, name: str = ""
) -> float:
    """How far our keys and values are from those that the module's own forward makes.

    The module runs under the identity rotation, and what reaches the attention function is
    compared: the largest difference, relative to the largest number. Infinite where shapes differ.
    """
    hidden_size = int(language_model.config.get_text_config().hidden_size)
    x_1Md = torch.linspace(-1, 1, 2 * hidden_size).view(1, 2, hidden_size)
    x_1Md = x_1Md.to(execution_device(attention), language_model.dtype)
    try:
        ours = project_prompt(attention, x_1Md)
    except (AttributeError, RuntimeError, TypeError, UnsupportedModelError) as error:
        raise UnsupportedModelError(
            f"{family_of(language_model)} cannot be adapted: {error}"
        ) from error
    own = _own_keys_values(language_model, attention, x_1Md, ours[0].shape[-1], name)
    return max(relative_difference(a, b) for a, b in zip(ours, own, strict=True))


def _own_keys_values(
    language_model: PreTrainedModel, attention: Attention, x_1Md: Tensor, head_size: int, name: str
) -> KeysValues:
    cos = x_1Md.new_ones(1, x_1Md.shape[1], _rotary_size(attention, head_size))
    try:
        with capture_keys_values() as captured:
            attention(
                hidden_states=x_1Md,
                position_embeddings=(cos, torch.zeros_like(cos)),
                attention_mask=None,
            )
    except (TypeError, AttributeError, RuntimeError, ValueError) as error:
        raise UnsupportedModelError(
            f"{family_of(language_model)} cannot be adapted: {name} does not run alone ({error})"
        ) from error
    if not captured:
        raise UnsupportedModelError(
            f"{family_of(language_model)} cannot be adapted: {name} does not use transformers' "
            "attention registry"
        )
    return captured[0]


@torch.no_grad()
def check_visual_route(language_model: PreTrainedModel, *, visual_prompts: object) -> None:
    """Refuse a family that drops keywords on the way to attention: images would do nothing.

    Raises UnsupportedModelError that names the family. Costs the layers before the first prompts.
    """
    device = execution_device(language_model.get_input_embeddings())
    if device.type == "meta":
        return
    tokens = torch.zeros(1, 1, dtype=torch.long, device=device)

    def run() -> None:
        language_model(tokens, visual_prompts=visual_prompts, use_cache=False)

    try:
        arrived = visual_prompts_arrive(run)
    except TypeError:
        arrived = False
    if not arrived:
        raise UnsupportedModelError(
            f"{family_of(language_model)} cannot be adapted to see: visual prompts do not reach "
            "its attention (fusion 'none' is text only)"
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
    device = execution_device(language_model.get_input_embeddings())
    if device.type == "meta":
        return
    vocabulary = int(language_model.config.get_text_config().vocab_size)
    size = SAMPLE_LENGTH
    # away from the special tokens, which mostly come first
    tokens = torch.arange(3 * size, device=device) * 7 % max(vocabulary - 4, 1)
    first, other, second = (tokens + min(3, vocabulary - 1)).clamp(max=vocabulary - 1).split(size)
    place = torch.arange(size, device=device)

    def logits(*samples: Tensor) -> Tensor:
        output = language_model(
            input_ids=torch.cat(samples).unsqueeze(0),
            position_ids=place.repeat(len(samples)).unsqueeze(0),
            use_cache=False,
        )
        return output.logits[0, -size:]

    was_training = [module for module in language_model.modules() if module.training]
    for module in was_training:
        module.training = False
    keep_unpacked(language_model)
    try:
        together, alone = logits(first, second), logits(second)
        leaked = relative_difference(logits(other, second), together)
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
    raise UnsupportedModelError(
        f"{family_of(language_model)} cannot share a row between samples: {reason}; "
        "give each sample a row of its own (in a recipe, data.padding: padded)"
    )


def relative_difference(ours: Tensor, own: Tensor) -> float:
    """The largest difference, relative to the largest number; infinite where shapes differ."""
    if ours.shape != own.shape:
        return float("inf")
    largest = own.float().abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return float((ours.float() - own.float()).abs().max() / largest)


def _rotary_size(attention: Attention, head_size: int) -> int:
    explicit = getattr(attention, "rotary_ndims", None)
    if explicit is not None:
        return int(explicit)
    parameters = getattr(attention.config, "rope_parameters", None) or {}
    if "partial_rotary_factor" not in parameters:  # nested by layer type, as in gemma3
        nested = [v for v in parameters.values() if isinstance(v, dict)]
        parameters = nested[0] if nested else parameters
    return int(head_size * parameters.get("partial_rotary_factor", 1.0))
