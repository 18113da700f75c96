"""`generate` for a model that reads pictures."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from llama_adapter.errors import UnsupportedModelError
from llama_adapter.model.gated_attention import VisualPrompts

CACHE = (
    "cache"
    if any(field.name == "cache" for field in fields(CausalLMOutputWithPast))
    else "past_key_values"
)
"""What the installed transformers calls the keys and values of earlier tokens: it renamed them in
5.24, and warns of the old name, as an input and on an output."""


class VisualGenerationMixin(GenerationMixin):
    """Carries visual prompts, made once, and what reads them through decoding."""

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        *args: Any,
        pixel_values: Tensor | None = None,
        visual_features: Tensor | None = None,
        visual_prompts: VisualPrompts | None = None,
        image_index: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in transformers; each picture passes the tower and the projections once."""
        if visual_prompts is None and (pixel_values is not None or visual_features is not None):
            visual_prompts = self.encode_visual(
                pixel_values, visual_features=visual_features, cache=True
            )
        if visual_prompts is not None:
            if image_index is None:
                # explicit, so that beams and several answers a prompt repeat it row by row
                image_index = torch.arange(len(visual_prompts.prompts_IMd), device=self.device)
            kwargs |= {"visual_prompts": visual_prompts, "image_index": image_index}
        return super().generate(inputs, *args, **kwargs)

    def _refuse_continuous_batching(self, *_args: Any, **_kwargs: Any) -> Any:
        """UnsupportedModelError: it runs all requests as one row and builds the mask itself."""
        raise UnsupportedModelError(
            "an adapted model cannot run transformers' continuous batching: its requests would "
            "read each other; give generate() a padded batch instead"
        )

    # its three entries; `generate(cache_implementation="paged")` goes through the first
    generate_batch = _refuse_continuous_batching
    continuous_batching_context_manager = _refuse_continuous_batching
    init_continuous_batching = _refuse_continuous_batching

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(*args, **kwargs)
        if inputs.get("visual_prompts") is None:
            return inputs
        tokens = inputs.get("input_ids")
        new_tokens = (inputs["inputs_embeds"] if tokens is None else tokens).shape[1]
        for name in _per_token(inputs):
            inputs[name] = inputs[name][:, -new_tokens:]
        mask = inputs.get("visual_mask")
        if mask is not None and new_tokens == 1 and not mask.any():
            # nothing reads the picture in this step: the base's own speed
            for name in ("visual_prompts", "visual_mask", "image_index"):
                inputs.pop(name, None)
        return inputs

    def _update_model_kwargs_for_generation(
        self,
        outputs: Any,
        model_kwargs: dict[str, Any],
        is_encoder_decoder: bool = False,
        num_new_tokens: int = 1,
    ) -> dict[str, Any]:
        updated: dict[str, Any] = super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, is_encoder_decoder, num_new_tokens
        )
        reads = self.adapter_config.visual_scope == "all"
        for name in _per_token(updated):
            known_BT = updated[name]
            last_B1 = known_BT[:, -1:]
            if not reads:
                # a generated token is no slot
                last_B1 = torch.full_like(last_B1, False if name == "visual_mask" else -1)
            updated[name] = torch.cat([known_BT, last_B1.expand(-1, num_new_tokens)], dim=1)
        return updated


def _per_token(inputs: dict[str, Any]) -> list[str]:
    """Which inputs say something of every token, and so grow and are sliced with them."""
    return [
        name
        for name in ("visual_mask", "image_index")
        if inputs.get(name) is not None and inputs[name].ndim == 2
    ]
