"""A family is adapted only if we compute a prompt's keys and values as it would itself."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llama_adapter.errors import UnsupportedModelError
from llama_adapter.model.attention_registry import capture_keys_values
from llama_adapter.model.prompt_projection import Attention, KeysValues, project_prompt

RELATIVE_TOLERANCE = 1e-3
"""Of the largest number compared; the same products in another order differ by far less."""


def check_projections(
    language_model: PreTrainedModel, attentions: list[tuple[str, Attention]]
) -> None:
    """Refuse a family whose keys and values of a prompt we would compute differently.

    Raises UnsupportedModelError that names the family and the module.
    """
    for name, attention in attentions:
        if attention.adaption.gate.is_meta:
            continue
        difference = oracle_difference(language_model, attention, name=name)
        if not difference <= RELATIVE_TOLERANCE:
            raise UnsupportedModelError(
                f"{_family(language_model)} cannot be adapted: keys and values of a prompt in "
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
    x_1Md = x_1Md.to(attention.adaption.gate.device, language_model.dtype)
    ours = project_prompt(attention, x_1Md)
    own = _own_keys_values(language_model, attention, x_1Md, ours[0].shape[-1], name)
    return max(_difference(a, b) for a, b in zip(ours, own, strict=True))


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
            f"{_family(language_model)} cannot be adapted: {name} does not run on its own ({error})"
        ) from error
    if not captured:
        raise UnsupportedModelError(
            f"{_family(language_model)} cannot be adapted: {name} does not use transformers' "
            "attention registry"
        )
    return captured[0]


def _difference(ours: Tensor, own: Tensor) -> float:
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


def _family(language_model: PreTrainedModel) -> str:
    return f"{language_model.config.model_type} ({type(language_model).__name__})"
