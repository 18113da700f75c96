"""The model card of an adapter on the hub: what it is, and how it is loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llama_adapter.files import final_name, write_atomically
from llama_adapter.model.configuration import LlamaAdapterConfig
from llama_adapter.uploads import CARD

_METADATA = re.compile(r"\A\ufeff?---[ \t]*\n(.*?\n)---[ \t]*\n(\s*# .*)?", re.DOTALL)
"""Of a card: its metadata, and the heading with which its text begins."""
_TERMS = ("license", "license_name", "license_link")
_LONGEST_CARD = 1 << 20
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")

_CARD = """---
{metadata}---

# {name}

A [LLaMA-Adapter](https://arxiv.org/abs/2303.16199) for {base}. This repository holds the adapter
alone; base{and_vision} are loaded by the names in `adapter_config.json`.

```python
from llama_adapter import LlamaAdapterForConditionalGeneration

model = LlamaAdapterForConditionalGeneration.from_pretrained("{name}")
```
{made_from}"""
_MADE_FROM = """
Made from `{name}`: its terms, and those of its data, hold for this one too.
"""


@dataclass(frozen=True, slots=True)
class Terms:
    """What the card of an adapter says of its license."""

    name: str
    """The adapter's."""
    metadata: Mapping[str, Any]
    """`license`, and perhaps `license_name` and `license_link`."""


def terms_of(directory: Path) -> Terms | None:
    """The terms that an adapter's card states; None where it has none, or no card."""
    path = directory / CARD
    if not path.is_file():
        return None
    with path.open("rb") as file:
        text = file.read(_LONGEST_CARD).decode("utf-8", errors="replace").replace("\r\n", "\n")
    found = _METADATA.match(text)
    try:
        stated = yaml.safe_load(found[1]) if found else None
    except (yaml.YAMLError, ValueError, RecursionError):
        return None  # a card is for people: what is wrong with it keeps nobody from the adapter
    if not isinstance(stated, dict):
        return None
    metadata = {key: stated[key] for key in _TERMS if _is_text(stated.get(key))}
    if "license" not in metadata:
        return None
    heading = ((found and found[2]) or "").strip().partition("\n")[0].strip("#` ")
    return Terms(heading or final_name(directory.resolve()), metadata)


def _is_text(value: Any) -> bool:
    several = value if isinstance(value, list) and value else [value]
    return all(isinstance(text, str) and text for text in several)


def model_card(
    config: LlamaAdapterConfig,
    name: str,
    *,
    tags: Sequence[str] = (),
    terms: Terms | None = None,
) -> str:
    """The text of `README.md`, with the metadata that the hub finds and links models by.

    `terms` are those of the adapter that this one was made from, and hold for it too.
    """
    base = _name(config.base)
    is_multimodal = config.vision is not None
    metadata: dict[str, Any] = {
        **({} if terms is None else terms.metadata),
        **({"base_model": base, "base_model_relation": "adapter"} if base else {}),
        "library_name": "llama-adapter",
        "pipeline_tag": "image-text-to-text" if is_multimodal else "text-generation",
        "tags": ["llama-adapter", *tags],
    }
    return _CARD.format(
        # values of JSON are values of YAML
        metadata="".join(f"{key}: {json.dumps(value)}\n" for key, value in metadata.items()),
        name=name,
        base=f"`{base}`" if base else "a model that has no name on the hub",
        and_vision=" and vision encoder" if is_multimodal else "",
        made_from="" if terms is None else _MADE_FROM.format(name=terms.name),
    )


def write_card(directory: Path, config: LlamaAdapterConfig, *, terms: Terms | None = None) -> None:
    """Write `README.md` where there is none: a card that somebody wrote stays."""
    path = directory / CARD
    if not path.exists():
        write_atomically(path, model_card(config, final_name(directory.resolve()), terms=terms))


def _name(described: Mapping[str, Any] | None) -> str:
    """A model's name on the hub; a directory or a part of a package has none."""
    name = str((described or {}).get("name_or_path") or "")
    return name if _HUB_NAME.fullmatch(name) and not Path(name).exists() else ""
