"""The model class that lmms-eval runs; needs lmms-eval to be installed."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmms_eval.api.model import lmms

from llama_adapter.conversation import Conversation, ImageRef
from llama_adapter.errors import EvaluationError, LlamaAdapterError
from llama_adapter.evaluation.answering import LocalAnswerer
from llama_adapter.evaluation.tasks.base import Generation
from llama_adapter.generation.answer import log_likelihoods
from llama_adapter.processing.video import VIDEO_SUFFIXES, load_video

_DEFAULTS = Generation(max_new_tokens=256)


class LlamaAdapterLmms(lmms):
    """Answers lmms-eval's requests with an adapter directory on its base."""

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        device: str = "cpu",
        batch_size: int | str = 1,
        frames: int | str = _DEFAULTS.frames,
        **unknown: Any,
    ) -> None:
        """Load the model. Options come as text from the command line.

        Args:
            pretrained: an adapter directory.
            device: where to put the model.
            batch_size: requests at once.
            frames: frames from a video.
            unknown: refused, save those that lmms-eval always passes.
        """
        super().__init__()
        unknown.pop("max_batch_size", None)
        if unknown:
            raise EvaluationError(f"unknown model argument {sorted(unknown)[0]!r}")
        from llama_adapter.model import LlamaAdapterForConditionalGeneration
        from llama_adapter.processing.processor import LlamaAdapterProcessor

        directory = Path(pretrained)
        self._model = LlamaAdapterForConditionalGeneration.from_pretrained(
            directory, device_map=device
        )
        self._model.prepare_for_inference()
        self._processor = LlamaAdapterProcessor.from_pretrained(directory)
        self._answerer = LocalAnswerer(self._model, self._processor, directory=directory)
        self._batch_size = int(batch_size)
        self._frames = int(frames)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers in the order of the requests, cut at their stop texts."""
        answers: list[str] = [""] * len(requests)
        groups: dict[str, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            groups[repr(sorted(request.args[1].items(), key=str))].append(index)
        for indices in groups.values():
            for start in range(0, len(indices), self._batch_size):
                chunk = indices[start : start + self._batch_size]
                options = requests[chunk[0]].args[1]
                texts = self._answer([requests[index] for index in chunk], options)
                for index, text in zip(chunk, texts, strict=True):
                    answers[index] = _cut(text, options.get("until"))
                    self.cache_hook.add_partial(
                        "generate_until", (requests[index].args[0], options), answers[index]
                    )
        return answers

    def _answer(self, requests: Sequence[Any], options: dict[str, Any]) -> list[str]:
        conversations = []
        for request in requests:
            context, _, doc_to_visual, doc_id, task, split = request.args
            images = self._images(doc_to_visual(self.task_dict[task][split][doc_id]))
            conversations.append(Conversation.ask(context, images=images))
        generation = Generation(
            max_new_tokens=int(options.get("max_new_tokens", _DEFAULTS.max_new_tokens)),
            temperature=float(options.get("temperature") or 0.0),
            beams=int(options.get("num_beams") or 1),
            frames=self._frames,
        )
        answers = self._answerer.answer(conversations, generation, seed=0)
        for answer in answers:
            if answer.problem is not None:
                # lmms-eval would count an empty answer as wrong without a word
                raise EvaluationError(answer.problem)
        return [answer.text or "" for answer in answers]

    def _images(self, visuals: Any) -> list[ImageRef]:
        refs = []
        for visual in visuals or ():
            if isinstance(visual, str) and Path(visual).suffix.lower() in VIDEO_SUFFIXES:
                video = load_video(visual, frames=self._frames)
                if video.note:
                    warnings.warn(f"{video.name}: {video.note}", stacklevel=2)
                refs.append(video.as_image_ref())
            else:
                refs.append(ImageRef.of(visual))
        return refs

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether it is the likeliest one."""
        return [self._likelihood(request) for request in requests]

    def _likelihood(self, request: Any) -> tuple[float, bool]:
        context, doc_to_target, doc_to_visual, doc_id, task, split = request.args
        doc = self.task_dict[task][split][doc_id]
        target = doc_to_target if isinstance(doc_to_target, str) else doc_to_target(doc)
        images = self._images(doc_to_visual(doc))
        try:
            asked = Conversation.ask(context, images=images, answer=str(target).strip())
            [found] = log_likelihoods(self._model, self._processor, [asked])
        except LlamaAdapterError as error:
            raise EvaluationError(f"{task} {doc_id}: {error}") from error
        return found.log_probabilities_A.sum().item(), found.is_greedy

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Rounds that a task makes up as it goes are not offered."""
        raise EvaluationError(
            f"llama_adapter answers single questions; {len(requests)} requests need several rounds"
        )


def _cut(text: str, until: str | Sequence[str] | None) -> str:
    """The text up to the first stop text."""
    for stop in [until] if isinstance(until, str) else until or ():
        if stop:
            text = text.split(stop)[0]
    return text.strip()
