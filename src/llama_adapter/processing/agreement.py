"""Whether a processor is the one that the adapter next to it was trained with.

What both files of a directory say must be the same. What only the processor knows (template,
placeholder, how images are scaled and normalized, the tokenizer) is recorded in
`adapter_config.json` when the two are saved together; directories of version 0.1 have no record.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_adapter.config import differing, from_version_1, shown
from llama_adapter.errors import CheckpointError
from llama_adapter.files import read_json, read_json_object, read_text, write_atomically

_ADAPTER_CONFIG = "adapter_config.json"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_FREE = frozenset({"model_max_length", "name_or_path", "processor_class", "transformers_version"})
"""Settings of a tokenizer that change none of its tokens."""
_RECORD = "processor"


def record(directory: Path, stored: Mapping[str, Any]) -> None:
    """Note in the adapter's config, where there is one, which processor is next to it."""
    content = _adapter_config(directory)
    if content is None:
        return
    content[_RECORD] = {"settings": _plain(stored), "tokenizer": _tokenizer(directory)}
    write_atomically(directory / _ADAPTER_CONFIG, json.dumps(content, indent=2) + "\n")


def check_agreement(directory: Path, stored: Mapping[str, Any]) -> None:
    """CheckpointError where the adapter in a directory was trained with another processor."""
    content = _adapter_config(directory)
    if content is None:
        return
    adapter = content.get("adapter")
    adapter_config = from_version_1(adapter) if isinstance(adapter, dict) else {"fusion": "none"}
    if adapter_config.get("fusion") != "none":
        for name in ("channel_order", "visual_scope"):
            if name in adapter_config and adapter_config[name] != stored.get(name):
                _refuse(directory, name, stored.get(name), adapter_config[name])
    known = content.get(_RECORD)
    if known is None:
        return
    if not isinstance(known, dict) or known.keys() != {"settings", "tokenizer"}:
        raise CheckpointError(f"{directory / _ADAPTER_CONFIG}: {_RECORD} is damaged")
    settings = known["settings"]
    if isinstance(settings, dict):
        settings = from_version_1(settings)
    for name, found, expected in differing(_plain(stored), settings):
        _refuse(directory, name, found, expected)
    ours, theirs = _tokenizer(directory), known["tokenizer"]
    for name in _TOKENIZER_FILES:
        if not isinstance(theirs, dict) or ours.get(name) != theirs.get(name):
            raise CheckpointError(
                f"{directory}: {name} is not the one that the adapter was saved with"
            )


def _refuse(directory: Path, name: str, found: Any, expected: Any) -> None:
    raise CheckpointError(
        f"{directory}: the processor has {name} {shown(found)}, but the adapter was trained with "
        f"{shown(expected)}"
    )


def _adapter_config(directory: Path) -> dict[str, Any] | None:
    path = directory / _ADAPTER_CONFIG
    if not path.is_file():
        return None
    content = read_json_object(path, error=CheckpointError)
    return content if content.get("model_type") == "llama_adapter" else None


def _plain(stored: Mapping[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(stored))
    return plain


def _tokenizer(directory: Path) -> dict[str, str]:
    """Checksums of what a tokenizer's files say, however they are laid out."""
    found = {}
    for name in _TOKENIZER_FILES:
        path = directory / name
        if not path.is_file():
            continue
        if path.suffix == ".json":
            content = read_json(path, error=CheckpointError)
            if isinstance(content, dict):
                content = {key: value for key, value in content.items() if key not in _FREE}
            text = json.dumps(content, sort_keys=True)
        else:
            text = "\n".join(read_text(path, error=CheckpointError).splitlines())
        found[name] = hashlib.sha256(text.encode()).hexdigest()
    return found
