"""The three architectures of exports: text, own placeholders, cross-attention."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from llama_adapter.families.vision import vision_feature_size, vision_features
from llama_adapter.model.projection import VisualProjection
from llama_adapter.model.references import load_vision
from torch import Tensor
from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.multimodal import MULTIMODAL_REGISTRY

from llama_adapter_vllm.attention import CrossPromptLayer, PlaceholderLayer, StaticPromptLayer
from llama_adapter_vllm.export import Export, check_export
from llama_adapter_vllm.processing import (
    CrossAttentionInfo,
    CrossAttentionProcessor,
    DummyInputs,
    PlaceholderInfo,
    PlaceholderProcessor,
)


class LlamaAdapterTextForCausalLM(LlamaForCausalLM):
    """Static prompts, or none, on a merged base."""

    layer_type: type[StaticPromptLayer] = StaticPromptLayer

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        directory = Path(vllm_config.model_config.model)
        check_export(directory)
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=self.layer_type)
        self.directory = directory
        self.export = Export.of(vllm_config.model_config.hf_config)


class _Multimodal(LlamaAdapterTextForCausalLM, SupportsMultiModal):
    """The vision encoder and the visual projection, in float32 as in training."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config, adapter = vllm_config.model_config.hf_config, self.export.adapter
        self.vision = load_vision(str(self.directory / "vision"))
        size = vision_feature_size(self.vision, adapter)
        self.visual = VisualProjection(size, config.hidden_size, config=adapter).float()
        self.visual.requires_grad_(False)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        # the vision encoder was loaded with its own files
        device = next(self.visual.parameters()).device
        self.vision.to(device)
        return super().load_weights(weights) | {
            f"vision.{n}" for n, _ in self.vision.named_parameters()
        }

    def get_language_model(self) -> torch.nn.Module:
        return self.model

    def visual_prompts(self, pixel_values: Any) -> Tensor:
        """Visual prompts of images, [I, M, d]."""
        pixels = pixel_values if isinstance(pixel_values, Tensor) else torch.stack(pixel_values)
        features = vision_features(self.vision, pixels, self.export.adapter)
        prompts_IMd: Tensor = self.visual(features)
        return prompts_IMd.to(self.model.norm.weight.dtype)


@MULTIMODAL_REGISTRY.register_processor(
    PlaceholderProcessor, info=PlaceholderInfo, dummy_inputs=DummyInputs
)
class LlamaAdapterPlaceholdersForConditionalGeneration(_Multimodal):
    """Images read by placeholder tokens, each its own prompt.

    What an image adds in the K visual layers is known before decoding: it is the "embedding" of
    its placeholders, K·d wide, kept by vLLM's encoder cache under the image's hash. Prefix caching
    and chunked prefill work as for any other model.
    """

    layer_type = PlaceholderLayer

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        most = vllm_config.scheduler_config.max_num_batched_tokens
        hidden_size = vllm_config.model_config.hf_config.hidden_size
        shape = (self.export.adapter.visual_layers, most, hidden_size)
        self.register_buffer("image_parts", torch.zeros(shape), persistent=False)
        for layer, parts_Td in zip(self._visual_layers, self.image_parts, strict=True):
            layer.keep_image_parts(parts_Td)

    @property
    def _visual_layers(self) -> Any:
        return self.model.layers[: self.export.adapter.visual_layers]

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        return None  # the chat template puts placeholders where the adapter learned them

    def embed_multimodal(self, **kwargs: Any) -> list[Tensor]:
        pixel_values = kwargs.get("pixel_values")
        if pixel_values is None:
            return []
        prompts_IMd = self.visual_prompts(pixel_values)
        flat = prompts_IMd.flatten(0, 1)
        parts = torch.cat(
            [layer.self_attn.image_part(flat) for layer in self._visual_layers], dim=-1
        )
        return list(parts.unflatten(0, prompts_IMd.shape[:2]))

    def embed_input_ids(
        self,
        input_ids: Tensor,
        multimodal_embeddings: Any = None,
        *,
        is_multimodal: Tensor | None = None,
    ) -> Tensor:
        """The tokens' own embeddings; what images add waits in `image_parts` for the layers."""
        embeds = self.model.embed_input_ids(input_ids)
        parts = self.image_parts[:, : len(embeds)].zero_()
        if multimodal_embeddings is not None and len(multimodal_embeddings):
            assert is_multimodal is not None
            rows = torch.cat(list(multimodal_embeddings)).to(parts)
            rows_KTd = rows.unflatten(-1, (len(parts), -1)).transpose(0, 1)
            parts[:, is_multimodal.to(parts.device)] = rows_KTd
        return embeds


@MULTIMODAL_REGISTRY.register_processor(
    CrossAttentionProcessor, info=CrossAttentionInfo, dummy_inputs=DummyInputs
)
class LlamaAdapterCrossAttentionForConditionalGeneration(_Multimodal):
    """Images read by all tokens, as vLLM's cross-attention: early fusion and late fusion.

    vLLM neither chunks prefills nor shares prefixes of such models.
    """

    layer_type = CrossPromptLayer

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        return None

    def embed_multimodal(self, **kwargs: Any) -> list[Tensor]:
        pixel_values = kwargs.get("pixel_values")
        if pixel_values is None:
            return []
        prompts_IMd = self.visual_prompts(pixel_values)
        # late fusion may add one prompt to all static ones
        return list(prompts_IMd.expand(-1, self.export.num_visual_tokens, -1).contiguous())

    def embed_input_ids(
        self,
        input_ids: Tensor,
        multimodal_embeddings: Any = None,
        *,
        is_multimodal: Tensor | None = None,
    ) -> Tensor:
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        encoder_outputs: list[Tensor] | None = None,
        **_: Any,
    ) -> Any:
        prompts = torch.cat(list(encoder_outputs)) if encoder_outputs else None
        return self.model(
            input_ids, positions, intermediate_tensors, inputs_embeds, visual_prompts=prompts
        )
