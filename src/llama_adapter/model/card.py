"""The model card of an adapter on the hub: what it is, and how it is loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_adapter.files import final_name, write_atomically
from llama_adapter.model.configuration import LlamaAdapterConfig
from llama_adapter.uploads import CARD

_OPENING = "---\n"
_TERMS = re.compile(r"license(_name|_link)?: *\S")
_HEADING = re.compile(r"^# (.*\S)", re.MULTILINE)
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
"""


def model_card(config: LlamaAdapterConfig, name: str, *, tags: Sequence[str] = ()) -> str:
    """The text of `README.md`, with the metadata that the hub finds and links models by."""
    base = _name(config.base)
    is_multimodal = config.vision is not None
    metadata: dict[str, Any] = {
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
    )


def write_card(directory: Path, config: LlamaAdapterConfig) -> None:
    """Write `README.md` where there is none: a card that somebody wrote stays."""
    path = directory / CARD
    if not path.exists():
        write_atomically(path, model_card(config, final_name(directory.resolve())))


def carry_terms(directory: Path, start: Path) -> None:
    """Let an adapter's card name the terms of the adapter that it was trained further from.

    They are the lines of metadata that the hub reads a license from; without any, nothing is added.
    """
    path, before = directory / CARD, start / CARD
    if not (path.is_file() and before.is_file()):
        return
    metadata, _, known = before.read_text("utf-8", errors="replace").partition("\n---\n")
    terms = "".join(f"{line}\n" for line in metadata.splitlines() if _TERMS.match(line))
    text = path.read_text("utf-8")
    if not terms or not text.startswith(_OPENING):
        return
    heading = _HEADING.search(known)
    name = final_name(start.resolve()) if heading is None else heading[1]
    note = (
        f"Trained further from `{name}`: its terms, and those of its data, hold for this one too."
    )
    write_atomically(path, f"{_OPENING}{terms}{text.removeprefix(_OPENING)}\n{note}\n")


def _name(described: Mapping[str, Any] | None) -> str:
    """A model's name on the hub; a directory or a part of a package has none."""
    name = str((described or {}).get("name_or_path") or "")
    return name if _HUB_NAME.fullmatch(name) and not Path(name).exists() else ""
