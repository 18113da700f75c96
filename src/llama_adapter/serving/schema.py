"""What clients may send: OpenAI's requests, of which every field is honored or refused by name."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from llama_adapter.config import did_you_mean
from llama_adapter.generation.grammar import MOST_CHARACTERS
from llama_adapter.generation.requests import MAX_TOP_LOGPROBS

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_SEED = 2**63 - 1

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "background": (False,),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "include": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
}
"""Fields that change nothing with these values, as some clients send them; null always does."""
IGNORED = frozenset(("metadata", "prompt_cache_key", "safety_identifier", "user"))
"""Labels for the caller's own use, which no answer depends on."""


def _unicode(text: str) -> str:
    text.encode()  # ValueError for half of a surrogate pair, which no tokenizer takes
    return text


Text = Annotated[str, AfterValidator(_unicode)]


class _Strict(BaseModel):
    """A JSON object that may have no field but those here."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, values: Any) -> Any:
        """Refuse a field before one that is missing, which may be the same one misspelled."""
        if not isinstance(values, dict):
            return values
        kept = {k: v for k, v in values.items() if not cls._is_neutral(k, v)}
        known = [field.alias or name for name, field in cls.model_fields.items()]
        for name in kept:
            if name not in known:
                similar = "" if name in NEUTRAL else did_you_mean(name, known)
                raise ValidationError.from_exception_data(
                    cls.__name__,
                    [
                        {
                            "type": PydanticCustomError(
                                "extra_forbidden", "not supported{similar}", {"similar": similar}
                            ),
                            "loc": (name,),
                            "input": kept[name],
                        }
                    ],
                )
        return kept

    @classmethod
    def _is_neutral(cls, _name: str, _value: Any) -> bool:
        """Whether a field is dropped, as one that changes nothing."""
        return False


class Body(_Strict):
    """A request's JSON object."""

    model_config = ConfigDict(allow_inf_nan=False)

    @classmethod
    def _is_neutral(cls, name: str, value: Any) -> bool:
        if value is None:
            return True
        if name in cls.model_fields:
            return False
        return name in IGNORED or value in NEUTRAL.get(name, ())


class Part(BaseModel):
    """A part of a message's content."""

    model_config = ConfigDict(extra="ignore", strict=True)

    type: Literal[
        "text", "image_url", "video_url", "input_text", "input_image", "output_text", "input_video"
    ]
    text: str | None = None
    image_url: MediaUrl | str | None = None
    video_url: MediaUrl | str | None = None

    @model_validator(mode="after")
    def _is_whole(self) -> Part:
        needed = self.type.removeprefix("input_").removeprefix("output_")
        needed = needed if needed == "text" else f"{needed.removesuffix('_url')}_url"
        given = [n for n in ("text", "image_url", "video_url") if getattr(self, n) is not None]
        if given != [needed]:
            others = ", ".join(map(repr, given)) or "nothing"
            raise ValueError(f"a part of type {self.type!r} needs {needed!r}, got {others}")
        return self

    @property
    def url(self) -> str | None:
        """Where the image or video is."""
        found = self.video_url if self.image_url is None else self.image_url
        return found.url if isinstance(found, MediaUrl) else found


class MediaUrl(BaseModel):
    """OpenAI's object around a URL; `detail` is up to the image processor."""

    model_config = ConfigDict(extra="ignore", strict=True)

    url: str


class ChatMessage(_Strict):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: str | None = None
    refusal: None = None
    type: Literal["message"] | None = None
    id: str | None = None
    status: str | None = None

    @property
    def texts(self) -> list[str]:
        """What it says."""
        if isinstance(self.content, str):
            return [self.content]
        return [part.text for part in self.content if part.text]

    @field_validator("content")
    @classmethod
    def _media_is_the_users(cls, content: Any, info: Any) -> Any:
        parts = content if isinstance(content, list) else []
        if info.data.get("role") != "user" and any(part.url is not None for part in parts):
            raise ValueError("only messages of the user may hold images and videos")
        return content


class StreamOptions(_Strict):
    """`stream_options`."""

    include_usage: bool = False
    include_obfuscation: bool = False


class SchemaFormat(_Strict):
    """`response_format.json_schema`."""

    name: str = "answer"
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(_Strict):
    """`response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaFormat | None = None

    @property
    def as_schema(self) -> str | None:
        """The JSON schema that the answer follows, as text."""
        if self.type == "text":
            return None
        schema = self.json_schema.schema_ if self.json_schema else {"type": "object"}
        return json.dumps(schema)

    @model_validator(mode="after")
    def _is_whole(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with type 'json_schema' and with nothing else")
        try:
            length = len(self.as_schema or "")
        except RecursionError as error:
            raise ValueError("the schema is nested too deeply") from error
        if length > MOST_CHARACTERS:
            raise ValueError(f"the schema has more than {MOST_CHARACTERS} characters")
        return self


Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Experts = Annotated[list[str], Field(max_length=32)]


class Drawn(Body):
    """How answers are drawn: the fields that all generating requests share."""

    model: str
    temperature: float = Field(0.0, ge=0, le=1e6)
    """OpenAI's default is 1; ours is that of the other commands, the likeliest token."""
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, le=1_000_000)
    """Not OpenAI's; -1 and 0: all tokens."""
    min_p: float = Field(0.0, ge=0, le=1)
    """Not OpenAI's."""
    seed: int | None = Field(None, ge=-MAX_SEED, le=MAX_SEED)
    stream: bool = False

    @property
    def sampling(self) -> dict[str, Any]:
        """Fields of `Sampling`."""
        return {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": max(self.top_k, 0),
            "min_p": self.min_p,
            # engines count several answers' seeds up from here
            "seed": None if self.seed is None else self.seed % 2**62,
        }


class _OfOneText(Drawn):
    """Fields of chat and text completions."""

    n: int = Field(1, ge=1, le=128)
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    max_tokens: int | None = Field(None, ge=1)
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    grammar: str | None = Field(None, max_length=MOST_CHARACTERS)
    """Not OpenAI's: a grammar in GBNF."""

    @model_validator(mode="after")
    def _goes_together(self) -> _OfOneText:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options goes with stream: true")
        if self.grammar is not None and self.schema_text is not None:
            raise ValueError("grammar and response_format exclude each other")
        return self

    @property
    def schema_text(self) -> str | None:
        """The JSON schema of the answer."""
        return None if self.response_format is None else self.response_format.as_schema

    @property
    def sampling(self) -> dict[str, Any]:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return {
            **super().sampling,
            "n": self.n,
            "stop": tuple(stop),
            "json_schema": self.schema_text,
            "grammar": self.grammar,
        }


class ChatRequest(_OfOneText):
    """`POST /v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=10_000)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MAX_TOP_LOGPROBS)
    experts: Experts | None = None
    """Not OpenAI's: which of the server's experts look at the images; by default all."""

    @model_validator(mode="after")
    def _fits(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs: true")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens exclude each other")
        return self

    @property
    def sampling(self) -> dict[str, Any]:
        return {
            **super().sampling,
            "max_tokens": self.max_completion_tokens or self.max_tokens,
            "logprobs": self.logprobs,
            "top_logprobs": self.top_logprobs,
        }


class CompletionRequest(_OfOneText):
    """`POST /v1/completions`: a text, taken as it is, goes on."""

    prompt: Text | list[Text] | list[int]
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)

    @field_validator("prompt")
    @classmethod
    def _is_one(cls, prompt: Any) -> Any:
        if isinstance(prompt, str):
            return prompt
        if not prompt or (isinstance(prompt[0], str) and len(prompt) > 1):
            raise ValueError("prompt must be one text or one list of tokens")
        return prompt[0] if isinstance(prompt[0], str) else prompt

    @property
    def sampling(self) -> dict[str, Any]:
        return {
            **super().sampling,
            "max_tokens": self.max_tokens or 16,
            "logprobs": self.logprobs is not None,
            "top_logprobs": self.logprobs or 0,
        }


class TextFormat(_Strict):
    """`text.format` of a response."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str = "answer"
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextOptions(_Strict):
    """`text` of a response."""

    format: TextFormat = Field(default_factory=TextFormat)


class ResponsesRequest(Drawn):
    """`POST /v1/responses`, as far as it needs no memory on the server."""

    input: str | Annotated[list[ChatMessage], Field(min_length=1, max_length=10_000)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    text: TextOptions = Field(default_factory=TextOptions)
    experts: Experts | None = None

    def as_chat(self) -> ChatRequest:
        """The same question to chat completions."""
        messages = [{"role": "user", "content": self.input}]
        if not isinstance(self.input, str):
            messages = [message.model_dump(exclude_none=True) for message in self.input]
        if self.instructions is not None:
            messages.insert(0, {"role": "system", "content": self.instructions})
        wanted = self.text.format
        found: dict[str, Any] = {"type": wanted.type}
        if wanted.type == "json_schema":
            found["json_schema"] = {"name": wanted.name, "schema": wanted.schema_}
        return ChatRequest.model_validate(
            {
                **self.model_dump(include={"model", "temperature", "top_p", "top_k", "min_p"}),
                "seed": self.seed,
                "stream": self.stream,
                "messages": messages,
                "max_tokens": self.max_output_tokens,
                "response_format": found,
                "experts": self.experts,
            }
        )


class TokenizeRequest(Body):
    """`POST /tokenize`: a text, or messages as the adapter's template renders them."""

    model: str
    prompt: Text | None = None
    messages: list[ChatMessage] | None = None

    @model_validator(mode="after")
    def _is_one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("either prompt or messages must be given")
        return self


class DetokenizeRequest(Body):
    """`POST /detokenize`."""

    model: str
    tokens: list[Annotated[int, Field(ge=0)]] = Field(max_length=1_000_000)


class AdapterRequest(Body):
    """`POST /v1/adapters`: a directory below the server's folder of adapters becomes a model."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,99}$")
    directory: str = Field(min_length=1, max_length=1000)
