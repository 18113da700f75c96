"""The processor: conversations and images in, model inputs out, in Hugging Face's conventions."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, BatchFeature, ProcessorMixin
from transformers.utils import cached_file

from llama_adapter.config import IGNORE_INDEX, from_version_1, not_one_of
from llama_adapter.conversation import Conversation, ImageRef
from llama_adapter.errors import CheckpointError, ConfigError, LlamaAdapterError, PromptError
from llama_adapter.files import read_json_object, write_atomically
from llama_adapter.pretrained import explain, load_pretrained
from llama_adapter.processing import agreement
from llama_adapter.processing.batching import EncodedSample, make_batch
from llama_adapter.processing.chat_template import ChatTemplate
from llama_adapter.processing.encoding import (
    Encoded,
    Side,
    encode,
    opening_ids,
    pad,
    pad_id,
)
from llama_adapter.processing.image_processors import image_processor_from, pixel_values
from llama_adapter.processing.keywords import BatchOptions, in_order, read_keywords
from llama_adapter.processing.pieces import Rendered
from llama_adapter.processing.prompts import (
    Informant,
    Prompt,
    as_conversation,
    as_prompts,
    fill_in,
    frames_of,
    hand_out,
    images_per_prompt,
)
from llama_adapter.processing.templates import CHAT, TEMPLATES, PromptRenderer
from llama_adapter.uploads import push_folder

_CHAT_TEMPLATE = (
    "{{ raise_exception('prompts are rendered by LlamaAdapterProcessor.apply_chat_template') }}"
    "{% generation %}{% endgeneration %}"
)
_SWITCHES = ("enable_thinking", "thinking", "reasoning_effort")
"""Switches of chat templates that callers pass whatever the template is."""
PROCESSOR_FILE = "processor_config.json"
_OPTIONS = ("template", "visual_scope", "placeholder_text", "channel_order")
# What a stored processor holds, and of which type.
_STORED: dict[str, Any] = {
    "processor_class": str,
    "image_processor": dict | None,
    "template": str,
    "visual_scope": str,
    "placeholder_text": str | None,
    "channel_order": str,
}
# Adapters of version 0.1 do not have it: what it says is found by trying.
_LATER = {"chat": dict | None}
_OF_TRANSFORMERS = {"auto_map"}
# Tokenizers without a limit of their own carry an astronomically large one.
_NO_LIMIT = 10**9


def check_options(
    *, template: str, visual_scope: str, placeholder_text: str | None, channel_order: str
) -> None:
    """ConfigError for options that no processor takes."""
    if template not in TEMPLATES:
        raise ConfigError(not_one_of("template", template, TEMPLATES))
    if visual_scope not in {"all", "placeholders"}:
        raise ConfigError(f"visual_scope must be 'all' or 'placeholders', got {visual_scope!r}")
    if channel_order not in {"rgb", "bgr"}:
        raise ConfigError(f"channel_order must be 'rgb' or 'bgr', got {channel_order!r}")
    if (visual_scope == "placeholders") != bool(placeholder_text):
        raise ConfigError(
            "placeholder_text goes with visual_scope 'placeholders' and with nothing else, "
            f"got visual_scope {visual_scope!r} and placeholder_text {placeholder_text!r}"
        )


class LlamaAdapterProcessor(ProcessorMixin):
    """Turns conversations with images into what `LlamaAdapterForConditionalGeneration` takes.

    Untrusted text can forge neither turns nor special tokens nor image placeholders; see
    `processing.templates`. Every option is stored with the adapter, since an adapter only works
    with the prompts that it was trained on.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        *,
        template: str = "alpaca",
        visual_scope: str = "all",
        placeholder_text: str | None = None,
        channel_order: str = "rgb",
        chat_switches: Mapping[str, Any] | None = None,
    ) -> None:
        """Set up for one base.

        Args:
            image_processor: a Hugging Face image processor; None for text alone.
            tokenizer: a fast Hugging Face tokenizer, the base model's own.
            template: a name in `processing.templates.TEMPLATES`.
            visual_scope: `all`, or `placeholders` where only placeholder tokens read the image.
            placeholder_text: the placeholder, with `placeholders`; special tokens or ordinary text.
            channel_order: `rgb`, or `bgr` for adapters trained on swapped channels.
            chat_switches: variables of the tokenizer's chat template, such as
                `{"enable_thinking": False}`, with template `chat`; None: those under which prompts
                are the beginning of talks, found by trying.
        """
        if tokenizer is None:
            raise ConfigError("LlamaAdapterProcessor needs a tokenizer, got None")
        check_options(
            template=template,
            visual_scope=visual_scope,
            placeholder_text=placeholder_text,
            channel_order=channel_order,
        )
        self.image_processor = image_processor
        self.tokenizer = tokenizer
        self.template = template
        self.visual_scope = visual_scope
        self.placeholder_text = placeholder_text
        self.channel_order = channel_order
        self.rendered: bool | None = None
        """What plain strings are where a call does not say; see `__call__`. It is not stored."""
        self._opening = opening_ids(tokenizer)
        if chat_switches and template != CHAT:
            raise ConfigError(f"chat_switches are of template 'chat', got template {template!r}")
        self._renderer = PromptRenderer(
            template,
            tokenizer=tokenizer,
            placeholder_text=placeholder_text,
            chat_switches=chat_switches,
        )

    @property
    def context_length(self) -> int | None:
        """Most tokens that the tokenizer says the base takes; None where it does not say."""
        length = self.tokenizer.model_max_length
        return int(length) if length < _NO_LIMIT else None

    def try_out(self) -> None:
        """Encode a short talk: what is damaged in the tokenizer fails here, not later.

        Raises what the damage raises.
        """
        length = self.tokenizer.model_max_length
        if not isinstance(length, int | float) or not length >= 1:
            raise ConfigError(
                f"the tokenizer's model_max_length must be at least 1, got {length!r}"
            )
        self.encode(Conversation.ask("a").assistant("b"), max_length=_NO_LIMIT)

    def count_tokens(self, text: str) -> int:
        """How many tokens a text has by itself."""
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    @property
    def ends(self) -> tuple[str, ...]:
        """The text after an answer that is learned with it: the end of generation."""
        return self._renderer.ends

    @property
    def stop_strings(self) -> list[str]:
        """Ends of an answer that are several tokens."""
        return [end for end in self.ends if self._token_of(end) is None]

    @property
    def stop_options(self) -> dict[str, Any]:
        """What `generate` needs to stop where an answer ends, whatever the base's own end is."""
        found = [self._token_of(end) for end in self.ends]
        ids = [*found, self.tokenizer.eos_token_id]
        options: dict[str, Any] = {}
        if any(token is not None for token in ids):
            options["eos_token_id"] = sorted({token for token in ids if token is not None})
        if self.stop_strings:
            options |= {"stop_strings": self.stop_strings, "tokenizer": self.tokenizer}
        return options

    def without_end(self, text: str) -> str:
        """A generated answer without what ended it."""
        text = text.strip()
        for end in self.ends:
            text = text.removesuffix(end).strip()
        return text

    def _token_of(self, text: str) -> int | None:
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        # another text may begin with an ordinary token; a stop string looks into tokens
        is_own = len(ids) == 1 and ids[0] in self.tokenizer.added_tokens_decoder
        return ids[0] if is_own else None

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values", "image_index", "visual_mask"]

    def render(
        self,
        conversation: Conversation,
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
    ) -> Rendered:
        """The prompt's text and where answers and placeholders are; see `PromptRenderer.render`.

        Answers that are not to be scored are left out of the places.
        """
        text = self._renderer.render(
            conversation,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )
        scored = [turn.scored for turn in conversation.turns if turn.role == "assistant"]
        if all(scored):
            return text
        answers = [span for span, keep in zip(text.answers, scored, strict=False) if keep]
        return Rendered(
            text,
            answers=answers,
            openings=text.openings,
            placeholders=text.placeholders,
            said=text.said,
        )

    def encode(
        self, prompt: Prompt, *, max_length: int | None = None, rendered: bool | None = None
    ) -> Encoded:
        """Token ids, labels and placeholders of one prompt; `rendered` as in `__call__`.

        Raises `PromptError` where it does not fit into `max_length` or the context.
        """
        prompt = self._as_said(prompt, self.rendered if rendered is None else rendered)
        text = prompt if isinstance(prompt, Rendered) else self.render(as_conversation(prompt))
        encoded = encode(text, tokenizer=self.tokenizer, opening=self._opening)
        limit = max_length or self.context_length
        if limit is not None and len(encoded) > limit:
            raise PromptError(f"prompt has {len(encoded)} tokens; the context holds {limit}")
        return encoded

    def _as_said(self, prompt: Prompt, rendered: bool | None, *, is_bare: bool = False) -> Prompt:
        """The prompt, a plain string as the question or the text that it is."""
        if not isinstance(prompt, str) or (isinstance(prompt, Rendered) and rendered is not False):
            return prompt
        if rendered:
            marks = (
                re.finditer(re.escape(self.placeholder_text), prompt)
                if self.placeholder_text
                else ()
            )
            return Rendered(
                prompt,
                placeholders=[mark.span() for mark in marks],
                continues=is_bare and not self._renderer.begins(prompt),
            )
        if rendered is None and self._renderer.looks_rendered(prompt):
            raise PromptError(
                "the text reads like a prompt that is rendered already; pass rendered=True to take "
                "it as it is, or rendered=False where it is a question"
            )
        end = self.tokenizer.eos_token
        if rendered is None and end and prompt.endswith(end):
            return self._renderer.whole(prompt.removesuffix(end), end)
        return str(prompt)

    @property
    def chat_template(self) -> str:
        """What tells trainers that answers can be told apart; `apply_chat_template` renders."""
        return _CHAT_TEMPLATE

    @chat_template.setter
    def chat_template(self, value: str | None) -> None:
        _refuse_chat_template(value)

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        context: str | None = None,
        images: Any = None,
        processor_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Render messages, and with `tokenize` process them with the images they hold.

        Takes one conversation or several: `Conversation` or Hugging Face messages. Without
        `tokenize` the result is text that `__call__` takes together with `images`. Other keywords
        are those of `__call__`, here or in `processor_kwargs`; with `return_dict`,
        `return_assistant_tokens_mask=True` adds `assistant_masks` (B, T). A switch of the chat
        template, such as `enable_thinking`, can only be the one that the adapter has.
        """
        _refuse_chat_template(chat_template)
        for name, value in (("tools", tools), ("documents", documents)):
            if value:
                raise ConfigError(f"the adapter's template has no place for {name}")
        options, image_processor = read_keywords(
            {**(processor_kwargs or {}), **self._without_switches(kwargs)},
            image_processor=self.image_processor,
        )
        if options.return_assistant_tokens_mask and not (tokenize and return_dict):
            raise ConfigError(
                "return_assistant_tokens_mask=True needs tokenize=True and return_dict=True"
            )
        single = isinstance(conversation, Conversation) or not isinstance(
            conversation[0], Sequence | Conversation
        )
        conversations = [as_conversation(c) for c in ([conversation] if single else conversation)]
        if context is not None:
            conversations = [c.with_context(context) for c in conversations]
        if tokenize or images is not None:
            conversations = hand_out(conversations, images)
        texts = [
            self.render(
                c,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
            )
            for c in conversations
        ]
        if not tokenize:
            return texts[0] if single else texts
        batch = self._batch(texts, [c.images for c in conversations], options, image_processor)
        return batch if return_dict else batch["input_ids"]

    def _without_switches(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Keywords without the chat template's switches; ConfigError where one is another."""
        fixed = getattr(self._renderer.template, "switches", {})
        for name in sorted({*fixed, *_SWITCHES} & kwargs.keys()):
            found, value = kwargs[name], fixed.get(name)
            if found is not None and found != value:
                raise ConfigError(
                    f"{name}={reprlib.repr(found)} is not what the adapter has, {value!r}: "
                    "chat_switches of LlamaAdapterProcessor fix the switches of a chat template"
                )
        return {n: v for n, v in kwargs.items() if n not in {*fixed, *_SWITCHES}}

    def __call__(
        self,
        *given: Any,
        text: Prompt | Sequence[Prompt] | None = None,
        images: Any = None,
        experts: Informant | None = None,
        rendered: bool | None = None,
        **options: Any,
    ) -> BatchFeature:
        """Model inputs for one prompt or a batch of prompts.

        Args:
            given: by position, a prompt or prompts; or images and prompts, as in Hugging Face's
                processors.
            text: prompts; a plain string is a question, put into the template. One that ends with
                the tokenizer's eos_token is a whole text instead, tokenized as it is.
            rendered: what plain strings are: True, texts to be taken as they are, trusted, such as
                a result of `apply_chat_template`; False, questions, whatever they hold; None, what
                the attribute `rendered` says, or else questions, but a `PromptError` where one
                reads like a rendered prompt. `add_special_tokens=False` means True.
            images: what the prompts do not hold themselves: an image, one a prompt, or a list of
                lists.
            experts: a `llama_adapter.experts.ExpertPool`, whose texts about the images become
                context. What the experts said is the result's attribute `contexts`, one tuple of
                reports for each prompt.
            options: those of `BatchOptions`, and settings of the image processor such as
                `do_resize`, by themselves or in `text_kwargs` and `images_kwargs`. `labels=True`
                adds labels (a training batch, padded on the right; otherwise padding is on the
                left, for generation).

        Returns:
            `input_ids` and `attention_mask` (B, T); with images `pixel_values` (I, 3, H, W), or
            (I, F, 3, H, W) where an image has frames, and `image_index`: the row of
            `pixel_values` that each row attends to, -1 for none, (B,), or (B, T) where rows hold
            several placeholders; with placeholders `visual_mask` (B, T); with `labels=True`
            `labels` (B, T).

        Raises ConfigError for a keyword that is not honored.
        """
        images, text = in_order(given, images=images, text=text)
        read, image_processor = read_keywords(options, image_processor=self.image_processor)
        if text is None:
            raise PromptError("a prompt is needed, got text None")
        is_bare = read.add_special_tokens is False
        if rendered is None:
            rendered = is_bare or self.rendered
        prompts = [self._as_said(p, rendered, is_bare=is_bare) for p in as_prompts(text)]
        texts: list[Rendered] = []
        held: list[tuple[ImageRef, ...]] = []
        contexts: list[tuple[Any, ...]] = []
        for prompt, extra in zip(prompts, images_per_prompt(images, len(prompts)), strict=True):
            if isinstance(prompt, Rendered):
                if experts is not None:
                    raise PromptError("a rendered prompt has no place left for what experts say")
                texts.append(prompt)
                held.append(extra)
            else:
                conversation = fill_in(as_conversation(prompt), extra)
                if experts is not None:
                    conversation, told, _ = experts.inform(conversation)
                    contexts.append(told)
                texts.append(self.render(conversation))
                held.append(conversation.images)
        batch = self._batch(texts, held, read, image_processor)
        if experts is not None:
            # an attribute, not an entry: entries are what the model takes
            batch.contexts = contexts
        return batch

    def _batch(
        self,
        texts: Sequence[Rendered],
        images: Sequence[tuple[ImageRef, ...]],
        options: BatchOptions,
        image_processor: Any,
    ) -> BatchFeature:
        limit = options.max_length or self.context_length
        if options.truncates and limit is not None:
            rows = [
                encode(text, tokenizer=self.tokenizer, opening=self._opening).truncated(limit)
                for text in texts
            ]
        else:
            rows = [self.encode(text, max_length=options.max_length) for text in texts]
        longest = max(map(len, rows))
        if not options.pads and any(len(row) != longest for row in rows):
            raise PromptError("prompts differ in length; padding=False cannot batch them")
        batch = self.collate(
            rows,
            images,
            labels=options.labels,
            side=options.side,
            length=options.length(longest, limit),
            image_processor=image_processor,
        )
        if options.return_assistant_tokens_mask:
            labels = [[int(label != IGNORE_INDEX) for label in row.labels] for row in rows]
            length = batch["input_ids"].shape[1]
            batch["assistant_masks"] = pad(labels, value=0, side=options.side, length=length)
        return options.shape(batch)

    def collate(
        self,
        rows: Sequence[Encoded],
        images: Sequence[Sequence[ImageRef]],
        *,
        labels: bool,
        side: Side,
        length: int | None = None,
        image_processor: Any = None,
        visual_features: Tensor | None = None,
    ) -> BatchFeature:
        """A batch of encoded prompts and the images of each.

        `image_processor` replaces the processor's own. With `visual_features` [I, P, C] of
        all images none is read.
        """
        samples = self.add_images(
            rows, images, image_processor=image_processor, visual_features=visual_features
        )
        inputs = make_batch(
            [[sample] for sample in samples],
            filling=pad_id(self.tokenizer),
            length=length or max(map(len, rows)),
            placeholders_only=self.visual_scope == "placeholders",
            side=side,
            labels=labels,
        )
        return BatchFeature(inputs)

    def add_images(
        self,
        rows: Sequence[Encoded],
        images: Sequence[Sequence[ImageRef]],
        *,
        image_processor: Any = None,
        visual_features: Tensor | None = None,
    ) -> list[EncodedSample]:
        """Encoded prompts with the pixels of their images, or with the features given for them.

        PromptError where a prompt has more or fewer placeholders than images.
        """
        if not any(images):
            return [EncodedSample(encoded=row) for row in rows]
        reader = image_processor or self.image_processor
        if reader is None:
            raise ConfigError("the prompt holds an image, but this adapter reads text alone")
        if self.visual_scope == "all":
            # one set of visual prompts a row: several images count as frames of one
            shown = [[refs] if refs else [] for refs in images]
        else:
            for number, (row, refs) in enumerate(zip(rows, images, strict=True), start=1):
                if (found := max(row.placeholders, default=-1) + 1) != len(refs):
                    raise PromptError(
                        f"prompt {number} has {found} image placeholders, but {len(refs)} images"
                    )
            shown = [[[ref] for ref in refs] for refs in images]
        counts = [len(of_row) for of_row in shown]
        if visual_features is not None:  # then nothing is decoded
            features = visual_features.split(counts)
            return [
                EncodedSample(encoded=row, features=of if len(of) else None)
                for row, of in zip(rows, features, strict=True)
            ]
        clips = [
            [frame for ref in refs for frame in frames_of(ref)]
            for of_row in shown
            for refs in of_row
        ]
        pixels = self._pixels(clips, reader).split(counts)
        return [
            EncodedSample(encoded=row, pixels=of if len(of) else None)
            for row, of in zip(rows, pixels, strict=True)
        ]

    def pixel_values(self, images: Sequence[ImageRef]) -> Tensor:
        """What the vision encoder takes: (I, 3, H, W) of images, (I, F, 3, H, W) of videos."""
        return self._pixels([frames_of(ref) for ref in images], self.image_processor)

    def _pixels(self, clips: Sequence[Sequence[Image.Image]], image_processor: Any) -> Tensor:
        """(I, 3, H, W), or (I, F, 3, H, W) where there is more than one frame."""
        longest = max(map(len, clips))
        even = [list(clip) * (longest if len(clip) == 1 else 1) for clip in clips]
        if any(len(clip) != longest for clip in even):
            found = sorted({len(clip) for clip in clips})
            raise PromptError(f"a batch must hold equally many frames a prompt, got {found}")
        frames = [frame for clip in even for frame in clip]
        if self.channel_order == "bgr":
            # swapped before normalization: the training code took BGR pixels for RGB
            frames = [Image.merge("RGB", frame.split()[::-1]) for frame in frames]
        pixels = pixel_values(image_processor, frames)
        return pixels if longest == 1 else pixels.unflatten(0, (len(clips), longest))

    def to_dict(self) -> dict[str, Any]:
        """What `save_pretrained` stores besides the tokenizer."""
        images = None if self.image_processor is None else self.image_processor.to_dict()
        options = {name: getattr(self, name) for name in _OPTIONS}
        stored = {"processor_class": type(self).__name__, "image_processor": images, **options}
        return {**stored, "chat": self._chat_record()}

    def _chat_record(self) -> dict[str, Any] | None:
        """What was read off the tokenizer's chat template, where prompts are made of it."""
        template = self._renderer.template
        return template.record() if isinstance(template, ChatTemplate) else None

    def save_pretrained(self, save_directory: Any) -> list[str]:
        """Write `processor_config.json` and the tokenizer's files."""
        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(directory)
        path = directory / PROCESSOR_FILE
        write_atomically(path, json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n")
        agreement.record(directory, self.to_dict())
        return [str(path)]

    def push_to_hub(
        self, repo_id: str, *, max_shard_size: int | str | None = None, **options: Any
    ) -> str:
        """Upload what `save_pretrained` writes to a repository on the hub; returns its address.

        `options` are `commit_message`, `commit_description`, `private`, `token`, `revision` and
        `create_pr`.
        """
        del max_shard_size  # of models
        return push_folder(self.save_pretrained, repo_id, what="processor", **options)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Self:
        """Read what `save_pretrained` wrote, from a directory or a model hub.

        `CheckpointError` says what is missing; further keywords are those of transformers.
        """
        where = pretrained_model_name_or_path
        kwargs.pop("trust_remote_code", None)  # Auto classes hand theirs on
        file = _stored_file(where, **kwargs)
        stored = _read(file)
        options = _options(stored, where=where)
        agreement.check_agreement(Path(where), stored)
        tokenizer = load_pretrained(AutoTokenizer, where, what="tokenizer of", **kwargs)
        settings = stored["image_processor"]
        images = None if settings is None else image_processor_from(settings, where=where)
        try:
            chat = stored.get("chat")
            switches = chat["switches"] if chat and options["template"] == CHAT else None
            processor = cls(images, tokenizer, **options, chat_switches=switches)
            processor.try_out()
            if chat not in (None, processor.to_dict()["chat"]):
                raise CheckpointError(
                    "the tokenizer's chat template opens or ends turns in another way than the "
                    f"one that {PROCESSOR_FILE} was saved with"
                )
        except LlamaAdapterError as error:
            raise CheckpointError(f"{where}: {explain(error)}") from error
        except Exception as error:  # damaged tokenizers fail in whatever way they like
            reason = explain(error)
            raise CheckpointError(f"the tokenizer of {where} is damaged: {reason}") from error
        return processor


def _refuse_chat_template(value: str | None) -> None:
    if value not in {None, _CHAT_TEMPLATE}:
        raise ConfigError("the adapter's template is fixed; chat_template cannot replace it")


def _stored_file(where: Any, *, subfolder: str = "", **kwargs: Any) -> Path:
    """`processor_config.json` of a directory, or of a model hub's cache."""
    if Path(where).is_dir():
        return Path(where) / subfolder / PROCESSOR_FILE
    try:
        return Path(str(cached_file(where, PROCESSOR_FILE, subfolder=subfolder, **kwargs)))
    except (OSError, ValueError) as error:
        reason = explain(error)
        raise CheckpointError(f"{where} has no readable {PROCESSOR_FILE}: {reason}") from error


def read_processor_options(directory: Path) -> dict[str, Any]:
    """The options of a stored processor, without loading its tokenizer."""
    return _options(_read(directory / PROCESSOR_FILE), where=directory)


def _read(file: Path) -> dict[str, Any]:
    """What a processor's file holds, by the names of today."""
    if not file.exists():
        raise CheckpointError(
            f"{file} is missing, which says how text becomes tokens: save the processor there "
            "(`processor.save_pretrained`), or import again with the base's tokenizer next to it"
        )
    return from_version_1(read_json_object(file, error=CheckpointError))


def _options(stored: Mapping[str, Any], *, where: Any) -> dict[str, Any]:
    """The options of ours, every one of which is stored; CheckpointError names what is wrong."""
    for name, expected in _STORED.items():
        if name not in stored:
            raise CheckpointError(f"{where}: {PROCESSOR_FILE} lacks {name}")
        if not isinstance(stored[name], expected):
            found = type(stored[name]).__name__
            raise CheckpointError(f"{where}: {PROCESSOR_FILE}: {name} cannot be of type {found}")
    for name, expected in _LATER.items():
        if not isinstance(stored.get(name), expected):
            raise CheckpointError(f"{where}: {PROCESSOR_FILE}: {name} must be an object or null")
    chat = stored.get("chat")
    if chat is not None and (
        chat.keys() != {"switches", "opening", "ends", "between_turns"}
        or not isinstance(chat["switches"], dict)
    ):
        raise CheckpointError(
            f"{where}: {PROCESSOR_FILE}: chat holds other keys than it is saved with"
        )
    unknown = sorted(set(stored) - set(_STORED) - set(_LATER) - _OF_TRANSFORMERS)
    if unknown:
        raise CheckpointError(f"{where}: {PROCESSOR_FILE} has an unknown key {unknown[0][:80]!r}")
    options = {name: stored[name] for name in _OPTIONS}
    try:
        check_options(**options)
    except ConfigError as error:
        raise CheckpointError(f"{where}: {PROCESSOR_FILE}: {explain(error)}") from error
    return options
