"""The one place that calls `from_pretrained` of transformers' Auto classes and processors.

Nothing that a directory holds is executed: `trust_remote_code=False` is passed always, so that
transformers neither imports a file of the directory nor asks on standard input whether it may.
"""

from __future__ import annotations

from typing import Any

from llama_adapter.errors import CheckpointError, LlamaAdapterError

MAX_REASON = 300
"""Characters of transformers' own explanation that an error message keeps."""


def load_pretrained(
    loader: Any,
    where: Any,
    *,
    what: str,
    error: type[LlamaAdapterError] = CheckpointError,
    **options: Any,
) -> Any:
    """`loader.from_pretrained(where, **options)` without code from files, or one clear `error`.

    `what` names the thing for the message ("base", "tokenizer"). Raises `error` for whatever is
    missing, damaged or needs code of its own.
    """
    try:
        return loader.from_pretrained(where, trust_remote_code=False, **options)
    except LlamaAdapterError:
        raise
    except (KeyboardInterrupt, MemoryError):
        raise
    except Exception as fault:  # damaged files make loaders of others raise whatever they like
        raise error(f"cannot load the {what} {str(where)!r}: {explain(fault)}") from fault


def explain(fault: BaseException) -> str:
    """What another library's error says, in one line of bounded length."""
    if "trust_remote_code" in str(fault) or "custom code" in str(fault):
        return "it needs code of its own, and code from files is never run"
    text = " ".join(str(fault).split()) or type(fault).__name__
    if isinstance(fault, KeyError | AttributeError | TypeError | IndexError):
        text = f"{type(fault).__name__}: {text}"
    return text if len(text) <= MAX_REASON else f"{text[: MAX_REASON - 3]}..."
