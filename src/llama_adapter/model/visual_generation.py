"""Transformers' `generate` for a model that reads pictures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin

from llama_adapter.config import AdapterConfig
from llama_adapter.model.gated_attention import VisualPrompts


class VisualGenerationMixin(GenerationMixin):
    """Carries visual prompts, made once, and their reading positions through decoding."""

    adapter_config: AdapterConfig

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
        """transformers' `generate`; each picture passes the tower and the projections once."""
        if visual_prompts is None and (pixel_values is not None or visual_features is not None):
            visual_prompts = self.encode_visual(
                pixel_values, visual_features=visual_features, cache=True
            )
        if visual_prompts is not None:
            if image_index is None:
                image_index = torch.arange(len(visual_prompts.prompts_IMd), device=self.device)
            kwargs |= {"visual_prompts": visual_prompts, "image_index": image_index}
        return super().generate(inputs, *args, **kwargs)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(*args, **kwargs)
        mask = inputs.get("visual_mask")
        if mask is not None:
            new_tokens = inputs["input_ids"].shape[1]
            inputs["visual_mask"] = mask[:, -new_tokens:]
            is_later = mask.shape[1] != new_tokens
            if is_later and self.adapter_config.visual_scope == "slots":
                # no slot among generated tokens: nothing reads the picture any more
                inputs["visual_prompts"] = inputs["visual_mask"] = None
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
        mask = updated.get("visual_mask")
        if mask is not None:
            reads = self.adapter_config.visual_scope == "all"
            added = mask.new_full((mask.shape[0], num_new_tokens), reads)
            updated["visual_mask"] = torch.cat([mask, added], dim=1)
        return updated
