"""`generate` for a model that reads images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin

from llama_adapter.config import did_you_mean
from llama_adapter.errors import ConfigError, UnsupportedModelError
from llama_adapter.families.structure import CACHE
from llama_adapter.model.places import continued, num_cached
from llama_adapter.model.routing import VisualPrompts

READING = ("visual_prompts", "visual_mask", "image_index")
"""Inputs that say what is read and by which tokens."""

NEW_TOKEN = {"visual_mask": False, "image_index": -1}
"""What is said of a generated token where placeholders alone read: it is none."""


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
        """As in transformers; each image passes the vision encoder and the projections once.

        `visual_mask` and an `image_index` by token cover the prompt, which includes cached tokens
        where generation goes on from a cache; or the new tokens of the prompt alone.
        """
        if visual_prompts is None and (pixel_values is not None or visual_features is not None):
            visual_prompts = self.encode_visual(
                pixel_values, visual_features=visual_features, cache=True
            )
        if visual_prompts is not None:
            if image_index is None:
                # explicit, so that beams and several answers a prompt repeat it row by row
                image_index = torch.arange(len(visual_prompts.prompts_IMd), device=self.device)
            kwargs |= {"visual_prompts": visual_prompts, "image_index": image_index}
            _cover_the_prompt(inputs, kwargs)
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

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        # inputs_embeds by name: transformers reads from the signature whether they are welcome
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, **kwargs
        )
        inputs.pop("tokenizer", None)  # that of stop strings, which generate hands through
        visual = inputs.get("visual_prompts")
        by_token = _by_token(inputs)
        if visual is None or not by_token:
            return inputs
        tokens = inputs.get("input_ids")
        tokens = inputs["inputs_embeds"] if tokens is None else tokens
        start = num_cached(inputs.get(CACHE))
        stop = start + tokens.shape[1]
        ends = self.adapter_config.visual_scope != "all"
        if ends and start >= max(inputs[name].shape[1] for name in by_token):
            # nothing reads the image behind the prompt: the base's own speed
            for name in READING:
                inputs.pop(name, None)
            return inputs
        for name in by_token:
            # counting placeholders needs those before the pass too
            first = 0 if self.adapter_config.placeholder_attention == "own" else start
            new = NEW_TOKEN[name] if ends else None
            inputs[name] = continued(inputs[name], start=first, stop=stop, new=new)
        return inputs

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("assistant_model") not in (None, self):
            # an assistant proposes from the text: images of ours are not in its hidden size
            given = kwargs["model_kwargs"]
            kwargs["model_kwargs"] = {k: v for k, v in given.items() if k not in READING}
        return super()._get_candidate_generator(*args, **kwargs)

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        known = self.known_keywords
        for name, value in model_kwargs.items():
            if value is not None and name not in known:
                near = did_you_mean(name, {*known, *vars(GenerationConfig())})
                raise ConfigError(f"generate has no keyword {name!r}{near}")


def _cover_the_prompt(inputs: Tensor | None, kwargs: dict[str, Any]) -> None:
    """Let what is said by token begin at the first token of the sequence, in place."""
    embeds = kwargs.get("inputs_embeds")
    prompt = kwargs.get("input_ids", inputs) if embeds is None else embeds
    attention_mask = kwargs.get("attention_mask")
    config = kwargs.get("generation_config")
    if prompt is None or getattr(config, "is_assistant", False):
        return
    length, total = prompt.shape[1], prompt.shape[1]
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
        total = attention_mask.shape[1]
    before = total - length
    for name in _by_token(kwargs):
        said = kwargs[name]
        if before > 0 and said.shape[1] == length:
            nothing = torch.full_like(said[:, :1], NEW_TOKEN[name]).expand(-1, before)
            kwargs[name] = torch.cat([nothing, said], dim=1)
        elif said.shape[1] != total:
            raise ConfigError(
                f"{name} covers {said.shape[1]} tokens, but the prompt has {total}: "
                "it must cover each"
            )


def _by_token(inputs: dict[str, Any]) -> list[str]:
    """Which inputs say something of every token."""
    return [name for name in NEW_TOKEN if inputs.get(name) is not None and inputs[name].ndim == 2]
