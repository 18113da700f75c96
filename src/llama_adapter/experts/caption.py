"""Captions: by an adapter on the same frozen base (V2 §4.4), or by a model of another kind.

With a caption adapter no second model is in memory: it takes the active adapter's place for the
time of a caption, and the active one comes back, exactly as it was.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import Field

from llama_adapter.conversation import Conversation
from llama_adapter.errors import ExpertError
from llama_adapter.experts.base import Expert, ExpertInfo, Finding, Report, Request, on_each_image
from llama_adapter.experts.options import Count, ExpertContext, ExpertOptions
from llama_adapter.experts.pipelines import check_size, load_pipeline, pipeline_version
from llama_adapter.files import expanded
from llama_adapter.generation import GenerationSettings
from llama_adapter.generation.answer import answer
from llama_adapter.model import LlamaAdapterForConditionalGeneration
from llama_adapter.model.configuration import ADAPTER_CONFIG_NAME
from llama_adapter.model.persistence import ADAPTER_WEIGHTS_NAME
from llama_adapter.processing.processor import LlamaAdapterProcessor

ADAPTER_INSTRUCTION = "describe the picture."
"""What adapters are asked that name no instruction of their own."""
MODEL_INSTRUCTION = "Describe the image in one sentence."


class CaptionOptions(ExpertOptions):
    """Describes the image: a caption adapter on the same base, or another model."""

    name = "caption"
    main = "model"

    model: str = Field(
        min_length=1,
        title="DIR",
        description="the directory of a caption adapter for the same base, or the name of an "
        "image-text-to-text model",
    )
    instruction: str | None = None
    max_new_tokens: Count = 96
    beams: Count = 1
    """Beam search with so many; 1: none."""

    def open(self, context: ExpertContext) -> Expert:
        directory = expanded(self.model)
        is_adapter = (directory / ADAPTER_CONFIG_NAME).is_file()
        if not is_adapter and (directory / "adapter" / ADAPTER_CONFIG_NAME).is_file():
            raise ExpertError(
                f"expert {self.name!r}: {self.model!r} holds no adapter (a run? its adapter is "
                f"{directory / 'adapter'})"
            )
        if not is_adapter:
            return PipelineCaptionExpert(self, device=context.device)
        if context.caption_expert is not None:
            return context.caption_expert(directory, self)
        if context.model is None:
            raise ExpertError("a caption adapter needs its base: no model is loaded")
        return load_caption_expert(directory, self, model=context.model)


class CaptionExpert:
    """Captions images with one of the model's loaded adapters."""

    name = "caption"

    def __init__(
        self,
        model: LlamaAdapterForConditionalGeneration,
        processor: LlamaAdapterProcessor,
        *,
        adapter_name: str = "caption",
        instruction: str | None = None,
        max_new_tokens: int = 96,
        beams: int = 1,
        version: str | None = None,
    ) -> None:
        """Set up; without a `version` captions are never cached."""
        self.model = model
        self.processor = processor
        self.adapter_name = adapter_name
        self.instruction = instruction
        self.settings = GenerationSettings(max_new_tokens=max_new_tokens, beams=beams)
        self.info = ExpertInfo(version=version, uses_question=False, uses_model=True)

    def consult(self, request: Request) -> Report:
        """One caption per image; ExpertError where they are not done in time."""
        if not request.images:
            return Report(expert=self.name)
        seconds = request.seconds_left
        active = self.model.active_adapter
        self.model.set_adapter(self.adapter_name)
        try:
            # an adapter that learned captions from one instruction is asked with that one
            learned = self.model.adapter_config.caption_instruction
            instruction = self.instruction or learned or ADAPTER_INSTRUCTION
            prompts = [Conversation.ask(instruction, images=[image]) for image in request.images]
            answers = answer(
                self.model, self.processor, prompts, self.settings, deadline=request.deadline
            )
        finally:
            self.model.set_adapter(active)
        if request.is_late:
            raise ExpertError(f"captions took longer than {seconds:.3g} seconds")
        return captions([one.text for one in answers])


def load_caption_expert(
    directory: Path, options: CaptionOptions, *, model: LlamaAdapterForConditionalGeneration
) -> CaptionExpert:
    """The caption expert of an adapter directory, loaded next to the model's other adapters.

    Raises CheckpointError where it belongs to another base.
    """
    # everything that a caption depends on, the image apart
    digest = hashlib.sha256()
    for name in (ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME):
        path = directory / name
        if not path.is_file():
            raise ExpertError(f"caption adapter {directory} lacks {name}")
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    settings = [options.instruction, options.max_new_tokens, options.beams]
    depends = [model.config.base, model.config.vision, str(model.dtype), *settings]
    digest.update(json.dumps(depends, sort_keys=True, default=str).encode())
    # the same directory may be asked for again; another one must not be taken for it
    adapter_name = f"caption-{hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:8]}"
    if adapter_name not in model.adapters:
        model.load_adapter(directory, adapter_name)
    return CaptionExpert(
        model,
        LlamaAdapterProcessor.from_pretrained(directory),
        adapter_name=adapter_name,
        instruction=options.instruction,
        max_new_tokens=options.max_new_tokens,
        beams=options.beams,
        version=digest.hexdigest()[:16],
    )


class PipelineCaptionExpert:
    """Captions images with a second model, of any kind that transformers can load.

    transformers 5 has no `image-to-text` pipeline any more; its models (BLIP, GIT, Pix2Struct …)
    are loaded as `image-text-to-text` ones, and captioners that take no instruction get none.
    """

    name = "caption"

    def __init__(self, options: CaptionOptions, *, device: str | None = None) -> None:
        """Load the model; ExpertError where there is none, or none that captions."""
        task = "image-text-to-text"
        self._pipeline = load_pipeline(task, options.model, expert=self.name, device=device)
        self._options = options
        settings = (options.instruction, options.max_new_tokens, options.beams)
        version = pipeline_version(self._pipeline, *settings)
        self.info = ExpertInfo(version=version, uses_question=False)

    def consult(self, request: Request) -> Report:
        """One caption per image; images not reached in time are noted."""
        return on_each_image(request, self._caption, Report(expert=self.name))

    def _caption(self, image: Image.Image) -> Report:
        check_size(self._pipeline, image)
        options = self._options
        settings = GenerationSettings(max_new_tokens=options.max_new_tokens, beams=options.beams)
        keywords: dict[str, Any] = {
            "generate_kwargs": settings.as_keywords(),
            "return_full_text": False,
        }
        instruction = options.instruction
        if getattr(self._pipeline.processor, "chat_template", None):
            content = [
                {"type": "image", "image": image},
                {"type": "text", "text": instruction or MODEL_INSTRUCTION},
            ]
            [found] = self._pipeline(text=[{"role": "user", "content": content}], **keywords)
        else:
            # plain captioners go on from a text; without an instruction, from nothing
            [found] = self._pipeline(images=image, text=instruction or "", **keywords)
        return captions([str(found["generated_text"]).strip()])


def captions(texts: list[str]) -> Report:
    """The report of one caption for each image."""
    findings = (Finding(text=t, kind="caption", image=i) for i, t in enumerate(texts))
    return Report(expert=CaptionOptions.name, findings=tuple(findings))
