"""Images of requests, in vLLM's terms: what they become, and which tokens stand for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from llama_adapter.processing.image_processors import pixel_values
from llama_adapter.processing.images import load_image
from llama_adapter.processing.processor import LlamaAdapterProcessor
from PIL import Image
from transformers import BatchFeature
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    EncDecMultiModalProcessor,
    PromptReplacement,
)

from llama_adapter_vllm.export import Export, check_export


@lru_cache(maxsize=4)
def _stored_processor(directory: Path) -> LlamaAdapterProcessor:
    check_export(directory)
    return LlamaAdapterProcessor.from_pretrained(directory / "processor")


class PlaceholderInfo(BaseProcessingInfo):
    """Any number of images, each a run of placeholders."""

    @cached_property
    def export(self) -> Export:
        return Export.of(self.get_hf_config())

    def get_hf_processor(self, **_: object) -> LlamaAdapterProcessor:
        return _stored_processor(Path(self.ctx.model_config.model))

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}

    def get_mm_max_tokens_per_item(
        self,
        seq_len: int,
        mm_counts: Mapping[str, int],
    ) -> Mapping[str, int]:
        return {"image": len(self.export.placeholder_ids)}


class CrossAttentionInfo(PlaceholderInfo):
    """One image, which the whole request reads."""

    skip_prompt_length_check = True
    """The encoder's prompt is padded."""

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": 1}

    def get_mm_max_tokens_per_item(
        self,
        seq_len: int,
        mm_counts: Mapping[str, int],
    ) -> Mapping[str, int]:
        return {"image": self.export.num_visual_tokens}


class DummyInputs(BaseDummyInputsBuilder[PlaceholderInfo]):
    """What vLLM measures its memory with."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return (self.info.export.placeholder_text or "") * mm_counts.get("image", 0)

    def get_dummy_mm_data(
        self,
        seq_len: int,
        mm_counts: Mapping[str, int],
        mm_options: Any,
    ) -> dict[str, Any]:
        images = [Image.new("RGB", (224, 224))] * mm_counts.get("image", 0)
        return {"image": images}


class _Pixels:
    """Pixels as the adapter's own processor makes them."""

    info: PlaceholderInfo

    def _call_hf_processor(
        self,
        hf_data: Mapping[str, Any],
        hf_kwargs: Mapping[str, object],
    ) -> BatchFeature:
        processor = self.info.get_hf_processor()
        images = [load_image(image) for image in hf_data["images"]]
        if processor.channel_order == "bgr":
            images = [Image.merge("RGB", image.split()[::-1]) for image in images]
        return BatchFeature({"pixel_values": pixel_values(processor.image_processor, images)})

    def _get_mm_fields_config(
        self,
        hf_inputs: BatchFeature,
        hf_processor_mm_kwargs: Mapping[str, object],
    ) -> Mapping[str, MultiModalFieldConfig]:
        return {"pixel_values": MultiModalFieldConfig.batched("image")}


class PlaceholderProcessor(_Pixels, BaseMultiModalProcessor[PlaceholderInfo]):
    """Finds the placeholders of images, which the chat template has put in."""

    def _get_prompt_updates(
        self,
        mm_items: Any,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: Any,
    ) -> Sequence[PromptReplacement]:
        ids = list(self.info.export.placeholder_ids)
        return [PromptReplacement(modality="image", target=ids, replacement=ids)]


class CrossAttentionProcessor(_Pixels, EncDecMultiModalProcessor[CrossAttentionInfo]):
    """Gives an image tokens of the encoder; the text holds none."""

    skip_decoder_start_token = True
    """The chat template writes the first token itself."""

    def create_encoder_prompt(self, prompt: Any, mm_items: Any) -> list[int]:
        return [0]

    def _get_prompt_updates(
        self,
        mm_items: Any,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: Any,
    ) -> Sequence[PromptReplacement]:
        tokens = [0] * self.info.export.num_visual_tokens
        return [PromptReplacement(modality="image", target=[0], replacement=tokens)]
