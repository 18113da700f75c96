"""Answers that follow a JSON schema or a grammar, through the optional package xgrammar.

Shape: V vocabulary.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.util import find_spec
from itertools import accumulate
from typing import Any

from torch import Tensor

from llama_adapter.errors import ConfigError, MissingDependencyError
from llama_adapter.generation.requests import Sampling

MOST_CHARACTERS = 1 << 14
"""Of a schema or grammar: compiling takes time by the cube of its properties that may be left out
and of its depth, minutes for four times as much, and cannot be ended."""
MOST_LEVELS = 100
"""Of brackets in a schema."""
_LOGGED = re.compile(r"^\[[\d:]+\] \S+:\d+: ")
"""The time and the line of its source, with which the library begins what it says."""
_TEXT = re.compile(r'"(?:[^"\\]|\\.)*"')


class Grammars:
    """Compiles grammars for one tokenizer, outside the loop that answers."""

    def __init__(self, tokenizer: Any, vocabulary: int) -> None:
        self._tokenizer, self._vocabulary = tokenizer, vocabulary
        self._workers = ThreadPoolExecutor(2, thread_name_prefix="grammar")
        self._starting = threading.Lock()
        self._compiler: Any = None

    def compile(self, sampling: Sampling) -> Future[Any] | None:
        """The compiled grammar of a request, once it is there; None where it asks for none.

        Raises ConfigError for one that is too long, and MissingDependencyError. The future raises
        ConfigError for one that is wrong.
        """
        for name in ("json_schema", "grammar"):
            text = getattr(sampling, name)
            if text is None:
                continue
            if len(text) > MOST_CHARACTERS:
                raise ConfigError(
                    f"{name} must have at most {MOST_CHARACTERS} characters, got {len(text)}"
                )
            if name == "json_schema" and _levels(text) > MOST_LEVELS:
                raise ConfigError(f"{name} must have at most {MOST_LEVELS} levels of brackets")
            if find_spec("xgrammar") is None:
                raise MissingDependencyError(
                    "xgrammar", extra="grammar", purpose="a JSON schema or a grammar"
                )
            return self._workers.submit(self._compile, name, text)
        return None

    def _start(self) -> Any:
        """The compiler; importing the library takes seconds, so it is done by a worker."""
        import xgrammar

        known = xgrammar.TokenizerInfo.from_huggingface(
            self._tokenizer, vocab_size=self._vocabulary
        )
        return xgrammar.GrammarCompiler(known, max_threads=1, cache_limit_bytes=1 << 28)

    def _compile(self, name: str, text: str) -> Any:
        with self._starting:
            compiler = self._compiler = self._compiler or self._start()
        try:
            if name != "json_schema":
                return compiler.compile_grammar(text)
            if (outside := next(_outside(text), None)) is not None:
                # the library would warn and let anything through
                raise ValueError(f"$ref {outside!r} leads out of the schema, expected #…")
            # a small model may write spaces between two tokens of JSON to the end of its time
            return compiler.compile_json_schema(text, max_whitespace_cnt=1)
        except Exception as error:  # of the library, whose classes change
            reason = str(error).strip().splitlines() or [type(error).__name__]
            said = _LOGGED.sub("", reason[-1])
            raise ConfigError(f"{name} cannot be used: {said[:200]}") from error


def _outside(schema: str) -> Iterator[str]:
    """References of a schema to what it does not hold itself."""
    waiting = [json.loads(schema)]
    while waiting:
        match waiting.pop():
            case dict() as found:
                if isinstance(ref := found.get("$ref"), str) and not ref.startswith("#"):
                    yield ref
                waiting += found.values()
            case list() as found:
                waiting += found


def _levels(text: str) -> int:
    """How deep the brackets of a JSON text are nested.

    >>> _levels('{"a": [1, {}], "[[[[": 2}')
    3
    """
    steps = {"{": 1, "[": 1, "}": -1, "]": -1}
    return max(accumulate(steps.get(letter, 0) for letter in _TEXT.sub("", text)), default=0)


class Matcher:
    """How far one answer has come in its grammar."""

    def __init__(self, compiled: Any, stop_ids: Sequence[int], vocabulary: int) -> None:
        import xgrammar

        self._library = xgrammar
        self._matcher = xgrammar.GrammarMatcher(
            compiled,
            override_stop_tokens=list(stop_ids) or None,
            terminate_without_stop_token=not stop_ids,
        )
        self._mask = xgrammar.allocate_token_bitmask(1, vocabulary)

    @property
    def is_ended(self) -> bool:
        """Whether nothing may follow."""
        return bool(self._matcher.is_terminated())

    def restrict(self, logits_V: Tensor) -> None:
        """Rule out, in place, what may not come next; ConfigError where nothing may."""
        if self.is_ended:
            return
        if self._matcher.fill_next_token_bitmask(self._mask) and not self._mask.any():
            raise ConfigError("the grammar asks for what no token of this model can write")
        self._library.apply_token_bitmask_inplace(
            logits_V.unsqueeze(0), self._mask.to(logits_V.device)
        )

    def take(self, token: int) -> None:
        """Go on behind a token."""
        if not self.is_ended:
            self._matcher.accept_token(token)
