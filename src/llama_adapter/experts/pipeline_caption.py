"""Captions by any `image-text-to-text` model of transformers, by name or directory."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from PIL import Image

from llama_adapter.errors import ExpertError
from llama_adapter.experts.base import Finding, Report, Traits
from llama_adapter.experts.pipelines import check_size, load_pipeline, pipeline_version

INSTRUCTION = "Describe the picture in one sentence."


class PipelineCaptionExpert:
    """Captions pictures with a second model, of any kind that transformers can load.

    transformers 5 has no `image-to-text` pipeline any more; its models (BLIP, GIT, Pix2Struct …)
    are loaded as `image-text-to-text` ones, and captioners that take no instruction get none.
    """

    name = "caption"

    def __init__(
        self,
        model: str,
        *,
        instruction: str | None = None,
        max_new_tokens: int = 96,
        device: str | None = None,
    ) -> None:
        """Load the model; ExpertError where there is none, or none that captions."""
        self._pipeline = load_pipeline("image-text-to-text", model, expert=self.name, device=device)
        self._instruction = instruction
        self._max_new_tokens = max_new_tokens
        version = pipeline_version(self._pipeline, instruction, max_new_tokens)
        self.traits = Traits(version=version, asks=False)

    def consult(self, images: Sequence[Image.Image], question: str) -> Report:  # noqa: ARG002
        """One caption per picture."""
        return self._captions(images, deadline=None)

    def consult_within(
        self,
        images: Sequence[Image.Image],
        question: str,  # noqa: ARG002
        *,
        seconds: float,
    ) -> Report:
        """One caption per picture; ExpertError where they are not done in time."""
        return self._captions(images, deadline=time.perf_counter() + seconds)

    def _captions(self, images: Sequence[Image.Image], *, deadline: float | None) -> Report:
        findings = []
        for index, image in enumerate(images):
            if deadline is not None and time.perf_counter() >= deadline:
                raise ExpertError(f"only {index} of {len(images)} captions were done in time")
            text = self._caption(image)
            findings.append(Finding(text=text, kind="caption", picture=index))
        return Report(expert=self.name, findings=tuple(findings))

    def _caption(self, image: Image.Image) -> str:
        check_size(self._pipeline, image)
        options: dict[str, Any] = {
            "generate_kwargs": {"max_new_tokens": self._max_new_tokens, "do_sample": False},
            "return_full_text": False,
        }
        chats = getattr(self._pipeline.processor, "chat_template", None)
        if chats:
            content = [
                {"type": "image", "image": image},
                {"type": "text", "text": self._instruction or INSTRUCTION},
            ]
            [found] = self._pipeline(text=[{"role": "user", "content": content}], **options)
        else:
            # plain captioners go on from a text; without an instruction, from nothing
            [found] = self._pipeline(images=image, text=self._instruction or "", **options)
        return str(found["generated_text"]).strip()
