"""Scores of samples that training never sees: perplexity of answers, quality of captions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llama_adapter.conversation import Conversation
from llama_adapter.data import Kind, Sample, SampleEncoder
from llama_adapter.data.packing import assemble
from llama_adapter.errors import DataError, LlamaAdapterError
from llama_adapter.generation import GenerationSettings
from llama_adapter.generation.answer import answer_inputs, log_likelihoods_of_inputs
from llama_adapter.model import LlamaAdapterForConditionalGeneration
from llama_adapter.processing.processor import LlamaAdapterProcessor
from llama_adapter.processing.prompts import frames_of
from llama_adapter.training.parallel import Engine
from llama_adapter.training.recipe import EvaluationSection
from llama_adapter.training.streams import HeldOut

CaptionScorer = Callable[[Sequence[str], Sequence[Sequence[str]]], Mapping[str, float]]
"""Captions and the references of each to scores such as `cider` and `bleu4`."""
_ROWS = 8


class _EndedError(Exception):
    """The run is to end before everything is scored."""


@dataclass(frozen=True, kw_only=True)
class HeldOutScorer:
    """Scores every source's held-out samples; called by all processes together.

    Works on the model as it trains: nothing is merged or cached that would disturb training.
    """

    section: EvaluationSection
    autocast_dtype: torch.dtype | None
    model: LlamaAdapterForConditionalGeneration
    processor: LlamaAdapterProcessor
    engine: Engine
    held_out: Mapping[str, HeldOut]
    encoders: Mapping[Kind, SampleEncoder]
    score_captions: CaptionScorer | None = None

    @torch.no_grad()
    def __call__(self, is_ended: Callable[[], bool] = lambda: False) -> dict[str, float] | None:
        """Scores by `SOURCE.METRIC`; None where `is_ended`, asked before each batch, says so."""
        self.model.eval()
        device, dtype = self.model.device.type, self.autocast_dtype
        scores: dict[str, float] = {}
        try:
            with torch.autocast(device, dtype, enabled=dtype is not None):
                for name, held_out in self.held_out.items():
                    found = self._scores(held_out, is_ended)
                    scores |= {f"{name}.{metric}": value for metric, value in found.items()}
        except _EndedError:
            return None
        finally:
            self.model.train()
        return scores

    def _scores(self, held_out: HeldOut, is_ended: Callable[[], bool]) -> dict[str, float]:
        wanted = range(min(self.section.samples, len(held_out)))
        samples = [*self._sound(held_out, wanted).values()]
        if not samples:
            return {}
        found = {"perplexity": self._perplexity(held_out, samples, is_ended)}
        if held_out.kind == "caption" and self.score_captions is not None:
            found |= self._captions(held_out, self.score_captions, is_ended)
        return found

    def _perplexity(
        self, held_out: HeldOut, samples: Sequence[Sample], is_ended: Callable[[], bool]
    ) -> float:
        """Of the answers' tokens, e to the mean of their negative log-likelihoods."""
        encoder = self.encoders[held_out.kind]
        sums = torch.zeros(2, dtype=torch.float64, device=self.model.device)
        for some, counts in self._shares(samples, is_ended):
            rows = []
            for sample in some:
                cut = encoder.cut(sample)[0]
                rows.append([encoder.encode_sample(sample, cut.first, cut.stop)])
            inputs = assemble(rows, self.processor, padding="padded", row_length=encoder.limit)
            batch = {key: tensor.to(self.model.device) for key, tensor in inputs.items()}
            found = log_likelihoods_of_inputs(self.model, batch)
            for likelihood in found if counts else ():
                log_probs_A = likelihood.log_probabilities_A.double()
                sums += torch.stack([-log_probs_A.sum(), sums.new_tensor(len(log_probs_A))])
        total, tokens = self.engine.all_reduce(sums).tolist()
        # before anything is learned it can be larger than is worth writing
        return math.exp(min(total / max(tokens, 1), 50.0))

    def _captions(
        self, held_out: HeldOut, score: CaptionScorer, is_ended: Callable[[], bool]
    ) -> Mapping[str, float]:
        images = self._images(held_out, self.section.samples)
        own: list[tuple[int, str]] = []
        numbered = list(enumerate(samples[0] for samples in images))
        for some, counts in self._shares(numbered, is_ended):
            texts = self._generate([_question(sample) for _, sample in some])
            if counts:
                own += [(number, text) for (number, _), text in zip(some, texts, strict=True)]
        found = dict(pair for of_rank in self.engine.gather(own) for pair in of_rank)
        captions = [found[number] for number in range(len(images))]
        references = [[sample.conversation.turns[-1].text for sample in some] for some in images]
        return score(captions, references)

    def _generate(self, questions: Sequence[Conversation]) -> list[str]:
        inputs = self._inputs(questions).to(self.model.device)
        # made here, for `generate` would use layers beyond a forward pass, where they are in shards
        self.engine.unshard_root()
        inputs["visual_prompts"] = self.model.encode_visual(
            inputs.pop("pixel_values", None), visual_features=inputs.pop("visual_features", None)
        )
        answers = answer_inputs(
            self.model,
            self.processor,
            inputs,
            GenerationSettings(max_new_tokens=self.section.max_new_tokens),
            synced_gpus=True if self.engine.world_size > 1 else None,
        )
        return [answer.text for answer in answers]

    def _images(self, held_out: HeldOut, most: int) -> list[list[Sample]]:
        """Samples by image: one to ask about, all of them to compare with."""
        groups = range(len(held_out)) if held_out.groups is None else held_out.groups.tolist()
        numbers: dict[int, list[int]] = {}
        for number, group in enumerate(groups):
            numbers.setdefault(group, []).append(number)
        chosen = list(numbers.values())[:most]
        sound = self._sound(held_out, [some[0] for some in chosen])
        return [
            [sound[first], *(held_out[n] for n in others)]
            for first, *others in chosen
            if first in sound
        ]

    def _sound(self, held_out: HeldOut, numbers: Iterable[int]) -> dict[int, Sample]:
        """Those of the samples whose images every process can read, by their numbers.

        Others are left out, as in training.
        """
        features = self.encoders[held_out.kind].features
        found: dict[int, Sample] = {}
        invalid: list[int] = []
        for number in numbers:
            try:
                sample = held_out[number]
                for ref in sample.conversation.images:
                    if features is None:
                        frames_of(ref)
                    else:
                        features.read([ref])
            except LlamaAdapterError:
                invalid.append(number)
                continue
            found[number] = sample
        of_any = {number for of_rank in self.engine.gather(invalid) for number in of_rank}
        return {number: sample for number, sample in found.items() if number not in of_any}

    def _inputs(self, questions: Sequence[Conversation]) -> Any:
        features = self.encoders["caption"].features
        if features is None:
            return self.processor(list(questions))
        images = [question.images for question in questions]
        return self.processor.collate(
            [self.processor.encode(question) for question in questions],
            images,
            labels=False,
            side="left",
            visual_features=features.read(ref for of_one in images for ref in of_one),
        )

    def _shares(
        self, items: Sequence[Any], is_ended: Callable[[], bool]
    ) -> Iterator[tuple[Sequence[Any], bool]]:
        """This process's batches, and whether each counts.

        All processes get equally many, since a sharded model computes only where all of them do.
        Raises _EndedError, in all of them, where there is no time for the next.
        """
        batches = [items[at : at + _ROWS] for at in range(0, len(items), _ROWS)]
        rank, world = self.engine.rank, self.engine.world_size
        for first in range(0, len(batches), world):
            mine = first + rank
            if is_ended():
                raise _EndedError
            counts = mine < len(batches)
            yield batches[mine if counts else 0], counts


def _question(sample: Sample) -> Conversation:
    """The conversation up to its last answer."""
    messages = sample.conversation.messages
    if messages[-1].role != "assistant":
        raise DataError(f"{sample.id}: does not end with an answer")
    return Conversation(messages=messages[:-1], context=sample.conversation.context)
