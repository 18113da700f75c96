"""The one place that calls `from_pretrained` of transformers' Auto classes and processors.

Nothing that a directory holds is executed: `trust_remote_code=False` is passed always, so that
transformers neither imports a file of the directory nor asks on standard input whether it may.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_adapter.errors import CheckpointError, LlamaAdapterError
from llama_adapter.files import open_regular, read_text

if TYPE_CHECKING:
    import torch

MAX_REASON = 300
"""Characters of transformers' own explanation that an error message keeps."""


@contextmanager
def seeded(seed: int | None, device: torch.device | None = None) -> Iterator[None]:
    """Weights that are drawn within the block follow from `seed`; None: from the global state."""
    if seed is None:
        yield
        return
    import torch  # scores of stored answers need none of it

    is_cuda = device is not None and device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if is_cuda else []):
        torch.manual_seed(seed)
        yield


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
    check_settings(Path(where) / (options.get("subfolder") or ""), error=error)
    try:
        return loader.from_pretrained(where, trust_remote_code=False, **options)
    except LlamaAdapterError:
        raise
    except MemoryError:
        raise
    except BaseException as fault:  # damaged files make loaders of others raise whatever they like
        # a panic of a library written in Rust is not an Exception
        if not isinstance(fault, Exception) and type(fault).__name__ != "PanicException":
            raise
        raise error(f"cannot load the {what} {str(where)!r}: {explain(fault)}") from fault


def check_settings(folder: Path, *, error: type[LlamaAdapterError] = CheckpointError) -> None:
    """`error` where a settings file that transformers would read from a folder is damaged.

    Its loaders wait for pipes, read `/dev/zero` and raise what they like.
    """
    if not folder.is_dir():
        return
    for path in (*folder.glob("*"), *folder.glob("additional_chat_templates/*")):
        if path.name in _SETTINGS:
            content = _read_object(path, error=error)
            if path.name == "config.json":
                _check_config(content, name=str(path), error=error)
        elif path.name.endswith(_INDEX):
            _check_index(path, error=error)
        elif path.name.endswith(_TEXTS):
            open_regular(path, error=error, limit=_MAX_VOCABULARY).close()


_SETTINGS = {
    "added_tokens.json",
    "chat_template.json",
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
}
_TEXTS = (".json", ".jinja", ".txt", ".model", ".tiktoken")
_INDEX = (".bin.index.json", ".safetensors.index.json")
_MAX_VOCABULARY = 1 << 30

COUNTS = re.compile(r"(^|_)(layers?|depths?|blocks|attention_types)$")
"""Settings that may count modules, or only point at some (`max_window_layers`)."""
_MOST_MODULES = 1 << 12
"""Four times the layers of the deepest published model."""
_MOST_LABELS = 1 << 20


def _check_config(content: Any, *, name: str, error: type[LlamaAdapterError]) -> None:
    """What transformers acts upon while it reads a config, before anybody can look at that."""
    for key, value in settings_in(content):
        if isinstance(value, str) and key.endswith("attn_implementation") and "/" in value:
            raise error(
                f"{name} has {key} {value[:80]!r}: it is downloaded code, and code from files is "
                "never run"
            )
        if not isinstance(value, int | float):
            continue
        most = _MOST_LABELS if key == "num_labels" else _MOST_MODULES
        # lists of that length are made of them
        if (key == "num_labels" or COUNTS.search(key)) and value > most:
            raise error(f"{name} has {key} {value:.12g}, more than {most}")
        if value != value:
            raise error(f"{name} has {key} NaN, expected a number")


def settings_in(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The plain values of nested settings, each with the nearest key above it."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from settings_in(part, name if name.endswith("attn_implementation") else str(key))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from settings_in(part, name)
    elif not isinstance(value, bool):
        yield name, value


def _check_index(path: Path, *, error: type[LlamaAdapterError]) -> None:
    """`error` where an index of shards names a file that is not next to it."""
    files = _read_object(path, error=error).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise error(f"{path} has no weight_map of file names")
    for name in sorted(set(files.values())):
        if Path(name).name != name:
            raise error(f"{path} names {name[:200]!r}, which is not next to it")
        if (path.parent / name).exists():
            open_regular(path.parent / name, error=error).close()


def _read_object(path: Path, *, error: type[LlamaAdapterError]) -> dict[str, Any]:
    # not as strict as files of ours: a key that occurs twice is its author's business
    try:
        content = json.loads(read_text(path, error=error))
    except (ValueError, RecursionError) as fault:
        raise error(f"{path} is not valid JSON: {explain(fault)}") from fault
    if not isinstance(content, dict):
        raise error(f"{path} must hold a JSON object, found {type(content).__name__}")
    return content


def explain(fault: BaseException) -> str:
    """What another library's error says, in one line of bounded length."""
    if "trust_remote_code" in str(fault) or "custom code" in str(fault):
        return "it needs code of its own, and code from files is never run"
    text = " ".join(str(fault).split()) or type(fault).__name__
    if isinstance(fault, KeyError | AttributeError | TypeError | IndexError):
        text = f"{type(fault).__name__}: {text}"
    return text if len(text) <= MAX_REASON else f"{text[: MAX_REASON - 3]}..."
