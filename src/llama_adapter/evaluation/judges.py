"""Who may judge: any OpenAI-compatible endpoint, a local model, or a comparison of words."""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from typing import Any, Protocol

from llama_adapter.errors import EvaluationError, import_extra
from llama_adapter.evaluation.records import Row, Verdict
from llama_adapter.generation import GenerationSettings
from llama_adapter.pretrained import load_pretrained

KEY_VARIABLES = ("LLAMA_ADAPTER_JUDGE_KEY", "OPENAI_API_KEY")


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """What came back for one prompt."""

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0


class JudgeUnavailableError(EvaluationError):
    """This one prompt got no reply, after all retries; others may."""


class Judge(Protocol):
    """Replies to a prompt; may be called from several threads if `concurrency` says so."""

    name: str
    """Is in every result."""
    concurrency: int
    """How many prompts may wait for a reply at once."""

    def ask(self, prompt: str, *, system: str, attempt: int) -> Reply:
        """The reply; a later `attempt` at the same prompt may draw another one."""
        ...

    def close(self) -> None:
        """Give back connections."""
        ...


class EndpointJudge:
    """A model behind an OpenAI-compatible endpoint."""

    def __init__(
        self,
        *,
        url: str,
        model: str,
        concurrency: int = 8,
        retries: int = 4,
        timeout: float = 60.0,
        max_tokens: int = 512,
    ) -> None:
        """The key comes from the environment; retries back off, and heed `Retry-After`."""
        openai = import_openai()
        key = next((os.environ[name] for name in KEY_VARIABLES if os.environ.get(name)), "none")
        self.name = f"{model} at {url}"
        self.model = model
        self.concurrency = concurrency
        self._max_tokens = max_tokens
        self._openai = openai
        self._client = openai.OpenAI(
            base_url=url, api_key=key, timeout=timeout, max_retries=retries
        )

    def ask(self, prompt: str, *, system: str, attempt: int) -> Reply:
        """Ask at temperature 0, and a little above it when the same question comes again."""
        openai = self._openai
        started = time.perf_counter()
        try:
            answer = self._client.chat.completions.create(
                model=self.model,
                messages=[
                    {"role": "system", "content": system},
                    {"role": "user", "content": prompt},
                ],
                temperature=0.0 if attempt == 0 else 0.3,
                seed=attempt,
                max_tokens=self._max_tokens,
            )
            text = answer.choices[0].message.content or ""
        except (openai.RateLimitError, openai.APIConnectionError) as error:
            raise JudgeUnavailableError(f"{self.name}: {short_error(error)}") from error
        except openai.APIStatusError as error:
            if error.status_code >= 500:
                raise JudgeUnavailableError(f"{self.name}: {short_error(error)}") from error
            raise EvaluationError(f"judge {self.name} refuses: {short_error(error)}") from error
        except (openai.APIError, ValueError, IndexError, TypeError, AttributeError) as error:
            # not JSON, or JSON that is not a chat completion
            raise JudgeUnavailableError(
                f"{self.name}: no completion: {short_error(error)}"
            ) from error
        usage = answer.usage
        return Reply(
            text=text,
            prompt_tokens=usage.prompt_tokens if usage else 0,
            completion_tokens=usage.completion_tokens if usage else 0,
            seconds=time.perf_counter() - started,
        )

    def close(self) -> None:
        """Close connections."""
        self._client.close()


class LocalJudge:
    """Any causal language model of Hugging Face, on this machine."""

    concurrency = 1

    def __init__(self, path: str, *, device: str = "cpu", max_tokens: int = 128) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from llama_adapter.model.hub import why_missing

        reason = why_missing(path)
        if reason is not None:
            raise EvaluationError(f"judge {path!r} cannot be loaded: {reason}")
        what, error = "judge", EvaluationError
        self._tokenizer: Any = load_pretrained(AutoTokenizer, path, what=what, error=error)
        self._model: Any = load_pretrained(
            AutoModelForCausalLM, path, what=what, error=error, device_map=device
        )
        self.name = f"local:{path}"
        self._max_tokens = max_tokens

    def ask(self, prompt: str, *, system: str, attempt: int) -> Reply:
        """The likeliest reply; a second attempt samples."""
        from llama_adapter.generation.answer import complete

        started = time.perf_counter()
        tokenizer = self._tokenizer
        if tokenizer.chat_template:
            messages = [
                {"role": "system", "content": system},
                {"role": "user", "content": prompt},
            ]
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        else:
            text = f"{system}\n\n{prompt}\n\n"
        settings = GenerationSettings(
            max_new_tokens=self._max_tokens, temperature=1.0 if attempt else 0.0
        )
        answer = complete(self._model, tokenizer, text, settings, seed=attempt)
        return Reply(
            text=answer.text,
            prompt_tokens=answer.prompt_tokens,
            completion_tokens=len(answer.tokens),
            seconds=time.perf_counter() - started,
        )

    def close(self) -> None:
        """Let go of the model."""
        self._model = None


_NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()  # noqa: SIM905
_SAME = (
    ("man", "guy", "male", "gentleman", "men"),
    ("woman", "lady", "female", "women"),
    ("child", "kid", "children", "toddler"),
    ("bicycle", "bike", "cycle"),
    ("television", "tv"),
    ("picture", "photo", "photograph", "image"),
    ("car", "automobile"),
    ("motorcycle", "motorbike"),
    ("cellphone", "phone", "smartphone", "telephone"),
    ("couch", "sofa"),
    ("speak", "talk"),
    ("grey", "gray"),
    ("puppy", "dog"),
    ("kitten", "cat"),
)
_CANONICAL = {word: group[0] for group in _SAME for word in group} | {
    word: str(value) for value, word in enumerate(_NUMBERS)
}
_ENDINGS = ("'s", "ing", "es", "ed", "s", "e")
_STOP = frozenset(("a", "an", "the"))


def plain_words(text: str) -> list[str]:
    """Lower-case words without punctuation and articles, unless a text has nothing else."""
    words = re.findall(r"[\w']+", text.lower()) or text.lower().split()
    return [word for word in words if word not in _STOP] or words


def canonical_words(text: str) -> list[str]:
    """Plain words with endings cut and each replaced by the first of its synonyms."""
    return [_canonical(word) for word in plain_words(text)]


def _canonical(word: str) -> str:
    stems = [stem for ending in _ENDINGS if (stem := _without(word, ending))]
    known = next((stem for stem in [word, *stems] if stem in _CANONICAL), None)
    return _CANONICAL[known] if known else next(iter(stems), word)


def _without(word: str, ending: str) -> str:
    if not word.endswith(ending) or len(word) - len(ending) < 3:
        return ""
    stem = word.removesuffix(ending)
    # "running" and "run": a doubled last letter belongs to the ending
    doubled = ending in {"ing", "ed"} and stem[-1] == stem[-2] and stem[-1] not in "ls"
    return stem[:-1] if doubled else stem


def exact_verdict(row: Row) -> Verdict:
    """Whether the answer is word for word one of the right ones, articles and case apart."""
    right = any(plain_words(row.answer) == plain_words(text) for text in _references(row))
    return {"pred": "yes" if right else "no", "score": 5 if right else 0}


def synonym_verdict(row: Row) -> Verdict:
    """Whether the answer holds a right answer's words, counting synonyms and inflections."""
    said = set(canonical_words(row.answer))
    right = any(
        words and said.issuperset(words) for words in map(canonical_words, _references(row))
    )
    return {"pred": "yes" if right else "no", "score": 5 if right else 0}


def _references(row: Row) -> list[str]:
    reference = row.record.reference
    return [str(text) for text in reference] if isinstance(reference, list) else [str(reference)]


WORD_JUDGES = {"exact-match": exact_verdict, "synonym-match": synonym_verdict}
"""Measures that need no model. They are not the published one, and are named apart from it."""


def import_openai() -> Any:
    """The `openai` package, or a message that says how to get it."""
    return import_extra("openai", extra="eval", purpose="an endpoint")


def short_error(error: BaseException) -> str:
    """What an error says, in one line of at most 200 letters."""
    return " ".join(str(error).split())[:200] or type(error).__name__
