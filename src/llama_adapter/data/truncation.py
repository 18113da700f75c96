"""From a conversation to tokens that fit a row, cut at turn borders where it is too long."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Literal, NamedTuple

from llama_adapter.config import IGNORE_INDEX
from llama_adapter.conversation import Conversation, ImageRef
from llama_adapter.data.feature_cache import FeatureCache
from llama_adapter.data.samples import Sample
from llama_adapter.errors import DataError, PromptError
from llama_adapter.processing.batching import EncodedSample
from llama_adapter.processing.encoding import Encoded, encode, joined, opening_ids
from llama_adapter.processing.processor import LlamaAdapterProcessor
from llama_adapter.processing.video import is_video, load_video

TooLong = Literal["skip", "truncate"]


class Cut(NamedTuple):
    """Some exchanges of a conversation, and how many tokens they make."""

    first: int
    """Exchanges are a question with its answer, counted from 0; of a sample with branches these
    are counted in their place, the conversation first."""
    stop: int
    tokens: int
    answer_tokens: int


class SampleEncoder:
    """Encodes samples for rows of one length; the same in every process."""

    def __init__(
        self, processor: LlamaAdapterProcessor, *, row_length: int, too_long: TooLong = "skip"
    ) -> None:
        self.features: FeatureCache | None = None
        """Where features of images are, once they are computed; None: images are decoded."""
        self.processor = processor
        # positions restart in every sample, so that only a sample is bound by the context
        self.limit = min(row_length, processor.context_length or row_length)
        self.too_long = too_long
        self._opening = opening_ids(processor.tokenizer)

    def cut(self, sample: Sample) -> list[Cut]:
        """Pieces that fit a row each, nearly as many exchanges as possible in each.

        Raises DataError where nothing can be scored, or where one exchange alone is too long
        and is to be skipped.
        """
        self._check_images(sample)
        if sample.branches:
            return self._cut_branches(sample)
        conversation = sample.conversation
        count = sum(turn.role == "assistant" for turn in conversation.turns)
        whole = self._encode(conversation)
        if not whole.num_answer_tokens:
            raise DataError(f"{sample.id}: holds no answer token to learn")
        if len(whole) <= self.limit:
            return [Cut(0, count, len(whole), whole.num_answer_tokens)]
        # token count up to the end of each answer: where the cuts will be, but for the opening
        ends = list(_answer_ends(whole.labels))
        cuts: list[Cut] = []
        first = 0
        while first < count:
            stop = count
            if len(ends) == count:
                before = ends[first - 1] if first else 0
                fitting = (k + 1 for k in range(first, count) if ends[k] - before <= self.limit)
                stop = max(fitting, default=first + 1)
            encoded = self._encode(_part(conversation, first, stop))
            while len(encoded) > self.limit and stop > first + 1:
                stop -= 1
                encoded = self._encode(_part(conversation, first, stop))
            if len(encoded) > self.limit:
                if self.too_long == "skip":
                    raise DataError(
                        f"{sample.id}: exchange {first + 1} has {len(encoded)} tokens; "
                        f"a row holds {self.limit} for one sample"
                    )
                encoded = encoded.truncated(self.limit)
            if encoded.num_answer_tokens:
                cuts.append(Cut(first, stop, len(encoded), encoded.num_answer_tokens))
            first = stop
        if not cuts:
            raise DataError(
                f"{sample.id}: its question alone fills the {self.limit} tokens of a row"
            )
        return cuts

    def _cut_branches(self, sample: Sample) -> list[Cut]:
        """As many branches in a piece as fit; none is cut in itself."""
        encoded = [self._encode(each) for each in (sample.conversation, *sample.branches)]
        for number, branch in enumerate(encoded, start=1):
            if not branch.num_answer_tokens:
                raise DataError(f"{sample.id}: branch {number} holds no answer token to learn")
        whole = self._joined(sample, encoded)
        if len(whole) <= self.limit:
            return [Cut(0, len(encoded), len(whole), whole.num_answer_tokens)]
        cuts: list[Cut] = []
        first = 0
        while first < len(encoded):
            stop = first + 1
            piece = self._joined(sample, encoded[first:stop])
            while stop < len(encoded):
                longer = self._joined(sample, encoded[first : stop + 1])
                if len(longer) > self.limit:
                    break
                piece, stop = longer, stop + 1
            if len(piece) > self.limit:
                raise DataError(
                    f"{sample.id}: branch {stop} has {len(piece)} tokens; "
                    f"a row holds {self.limit} for one sample"
                )
            cuts.append(Cut(first, stop, len(piece), piece.num_answer_tokens))
            first = stop
        return cuts

    def _joined(self, sample: Sample, encoded: Sequence[Encoded]) -> Encoded:
        try:
            return joined(encoded)
        except PromptError as error:
            raise DataError(f"{sample.id}: {error}") from error

    def encode(self, sample: Sample, first: int, stop: int) -> Encoded:
        """Tokens of some exchanges; never more than fit."""
        if sample.branches:
            branches = (sample.conversation, *sample.branches)[first:stop]
            return self._joined(sample, [self._encode(each) for each in branches])
        count = sum(turn.role == "assistant" for turn in sample.conversation.turns)
        conversation = sample.conversation
        if (first, stop) != (0, count):
            conversation = _part(conversation, first, stop)
        encoded = self._encode(conversation)
        return encoded.truncated(self.limit) if self.too_long == "truncate" else encoded

    def encode_sample(self, sample: Sample, first: int, stop: int) -> EncodedSample:
        """Tokens and pixels. LlamaAdapterError where an image cannot be read."""
        encoded = self.encode(sample, first, stop)
        images = sample.conversation.images
        if not images:
            return EncodedSample(id=sample.id, encoded=encoded)
        features = None
        if self.features is None:
            images = tuple(map(whole_image, images))
        else:
            features = self.features.read(images)
        try:
            [found] = self.processor.add_images([encoded], [images], visual_features=features)
        except PromptError as error:
            raise DataError(f"{sample.id}: {error}") from error
        return replace(found, id=sample.id)

    def _encode(self, conversation: Conversation) -> Encoded:
        text = self.processor.render(conversation)
        encoded = encode(text, tokenizer=self.processor.tokenizer, opening=self._opening)
        # in a packed row this label would be learned from the last token of another sample
        return replace(encoded, labels=(IGNORE_INDEX, *encoded.labels[1:]))

    def _check_images(self, sample: Sample) -> None:
        count = len(sample.conversation.images)
        if count > 1 and self.processor.visual_scope == "all":
            raise DataError(
                f"{sample.id}: holds {count} images, but visual_scope 'all' reads one a sample"
            )


def whole_image(ref: ImageRef) -> ImageRef:
    """The image; of a video the frames, DataError where some of it cannot be decoded."""
    if not is_video(ref.source):
        return ref
    video = load_video(ref.source, name=ref.name)
    if video.note:
        raise DataError(f"{video.name}: {video.note}")
    return video.as_image_ref()


def _answer_ends(labels: tuple[int, ...]) -> Iterator[int]:
    for index, (label, after) in enumerate(pairwise((*labels, IGNORE_INDEX)), start=1):
        if label != IGNORE_INDEX and after == IGNORE_INDEX:
            yield index


def _part(conversation: Conversation, first: int, stop: int) -> Conversation:
    """Some exchanges, with the system message and the context; images are shown at the start."""
    turns = conversation.turns[2 * first : 2 * stop]
    before = conversation.messages[: len(conversation.messages) - len(conversation.turns)]
    part = Conversation(messages=(*before, *turns), context=conversation.context)
    shown = [image for turn in conversation.turns[: 2 * first] for image in turn.images]
    return part.with_images(shown) if shown else part
