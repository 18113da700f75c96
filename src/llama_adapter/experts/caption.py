"""The paper's default expert: a caption adapter on the same frozen base (V2 §4.4).

No second model is in memory: the caption adapter takes the active one's place for the time of
a caption, and the active one comes back, exactly as it was.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from llama_adapter.conversation import Conversation
from llama_adapter.errors import ExpertError
from llama_adapter.experts.base import Finding, Report, Traits
from llama_adapter.model import LlamaAdapterForConditionalGeneration
from llama_adapter.model.configuration import ADAPTER_CONFIG_NAME
from llama_adapter.model.persistence import ADAPTER_WEIGHTS_NAME
from llama_adapter.processing.processor import LlamaAdapterProcessor

INSTRUCTION = "describe the picture."
"""What adapters are asked that name no instruction of their own."""


class CaptionExpert:
    """Captions pictures with one of the model's loaded adapters."""

    name = "caption"

    def __init__(
        self,
        model: LlamaAdapterForConditionalGeneration,
        processor: LlamaAdapterProcessor,
        *,
        adapter_name: str = "caption",
        instruction: str | None = None,
        max_new_tokens: int = 96,
        version: str | None = None,
    ) -> None:
        """Set up; without a `version` captions are never remembered."""
        self.model = model
        self.processor = processor
        self.adapter_name = adapter_name
        self.instruction = instruction
        self.max_new_tokens = max_new_tokens
        self.traits = Traits(version=version, asks=False, on_model=True)

    def consult(self, images: Sequence[Image.Image], question: str) -> Report:  # noqa: ARG002
        """One caption per picture."""
        return self._captions(images, seconds=None)

    def consult_within(
        self,
        images: Sequence[Image.Image],
        question: str,  # noqa: ARG002
        *,
        seconds: float,
    ) -> Report:
        """One caption per picture; ExpertError where they are not done in time."""
        return self._captions(images, seconds=seconds)

    @torch.no_grad()
    def _captions(self, images: Sequence[Image.Image], *, seconds: float | None) -> Report:
        if not images:
            return Report(expert=self.name)
        started = time.perf_counter()
        limit: dict[str, Any] = {} if seconds is None else {"max_time": seconds}
        active = self.model.active_adapter
        self.model.set_adapter(self.adapter_name)
        try:
            # an adapter that learned captions from one instruction is asked with that one
            learned = self.model.adapter_config.caption_instruction
            instruction = self.instruction or learned or INSTRUCTION
            prompts = [Conversation.ask(instruction, images=[image]) for image in images]
            inputs = self.processor(prompts, padding_side="left").to(self.model.device)
            tokens = self.model.generate(
                **inputs, max_new_tokens=self.max_new_tokens, do_sample=False, **limit
            )
        finally:
            self.model.set_adapter(active)
        if seconds is not None and time.perf_counter() - started >= seconds:
            raise ExpertError(f"captions took longer than {seconds:g} seconds")
        answers = self.processor.batch_decode(
            tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        findings = tuple(
            Finding(text=answer.strip(), kind="caption", picture=index)
            for index, answer in enumerate(answers)
        )
        return Report(expert=self.name, findings=findings)


def is_adapter_directory(where: str) -> bool:
    """Whether a path is an adapter directory of ours."""
    return (Path(where).expanduser() / ADAPTER_CONFIG_NAME).is_file()


def load_caption_expert(
    where: str,
    *,
    model: LlamaAdapterForConditionalGeneration,
    instruction: str | None = None,
    max_new_tokens: int = 96,
) -> CaptionExpert:
    """The caption expert of an adapter directory, loaded beside the model's other adapters.

    Raises CheckpointError where it belongs to another base.
    """
    directory = Path(where).expanduser()
    version = _version(directory, model, instruction, max_new_tokens)
    # the same directory may be asked for again; another one must not be taken for it
    adapter_name = f"caption-{hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:8]}"
    if adapter_name not in model.adapters:
        model.load_adapter(directory, adapter_name)
    return CaptionExpert(
        model,
        LlamaAdapterProcessor.from_pretrained(directory),
        adapter_name=adapter_name,
        instruction=instruction,
        max_new_tokens=max_new_tokens,
        version=version,
    )


def _version(
    directory: Path,
    model: LlamaAdapterForConditionalGeneration,
    instruction: str | None,
    max_new_tokens: int,
) -> str:
    """A name for everything that a caption depends on, the picture apart."""
    digest = hashlib.sha256()
    for name in (ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME):
        path = directory / name
        if not path.is_file():
            raise ExpertError(f"caption adapter {directory} lacks {name}")
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    rest = [model.config.base, model.config.vision, str(model.dtype), instruction, max_new_tokens]
    digest.update(json.dumps(rest, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]
