"""Every source type that a recipe may name."""

from __future__ import annotations

from collections.abc import Mapping

from llama_adapter.data.caption_texts import CaptionQuestionOptions, CaptionTaskOptions
from llama_adapter.data.captions import CocoOptions, PairsOptions
from llama_adapter.data.conversations import AlpacaOptions, LlavaOptions, ShareGptOptions
from llama_adapter.data.samples import SourceOptions
from llama_adapter.data.tar_shards import WebDatasetOptions
from llama_adapter.data.vqa import VqaOptions

SOURCES: Mapping[str, type[SourceOptions]] = {
    "alpaca": AlpacaOptions,
    "sharegpt": ShareGptOptions,
    "llava": LlavaOptions,
    "coco_captions": CocoOptions,
    "pairs": PairsOptions,
    "caption_tasks": CaptionTaskOptions,
    "caption_questions": CaptionQuestionOptions,
    "webdataset": WebDatasetOptions,
    "vqa": VqaOptions,
}
