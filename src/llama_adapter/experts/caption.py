"""The paper's default expert: a caption adapter on the same frozen base (V2 §4.4).

No second model is in memory: the caption adapter takes the active one's place for the time of
a caption, and the active one comes back, exactly as it was.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image

from llama_adapter.conversation import Conversation
from llama_adapter.experts.base import Finding, Report
from llama_adapter.model import LlamaAdapterForConditionalGeneration
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
    ) -> None:
        self.model = model
        self.processor = processor
        self.adapter_name = adapter_name
        self.instruction = instruction
        self.max_new_tokens = max_new_tokens

    @torch.no_grad()
    def consult(self, images: Sequence[Image.Image], question: str) -> Report:  # noqa: ARG002
        """One caption per picture."""
        if not images:
            return Report(expert=self.name, findings=())
        active = self.model.active_adapter
        self.model.set_adapter(self.adapter_name)
        try:
            # an adapter that learned captions from one instruction is asked with that one
            learned = self.model.adapter_config.caption_instruction
            instruction = self.instruction or learned or INSTRUCTION
            prompts = [Conversation.ask(instruction, images=[image]) for image in images]
            inputs = self.processor(prompts, padding_side="left").to(self.model.device)
            tokens = self.model.generate(
                **inputs, max_new_tokens=self.max_new_tokens, do_sample=False
            )
        finally:
            self.model.set_adapter(active)
        answers = self.processor.batch_decode(
            tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        findings = tuple(
            Finding(text=answer.strip(), kind="caption", picture=index)
            for index, answer in enumerate(answers)
        )
        return Report(expert=self.name, findings=findings)
