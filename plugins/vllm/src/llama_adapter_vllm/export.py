"""What an export says of itself, checked before anything is loaded from it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_adapter.checkpoints.directories import EXPORT_MARKER
from llama_adapter.checkpoints.vllm_export import FORMAT_VERSION
from llama_adapter.config import AdapterConfig
from llama_adapter.errors import CheckpointError
from llama_adapter.files import read_json_object


@dataclass(frozen=True, kw_only=True, slots=True)
class Export:
    """The plugin's part of a `config.json`."""

    adapter: AdapterConfig
    placeholder_text: str | None
    placeholder_ids: tuple[int, ...]

    @classmethod
    def of(cls, config: Any) -> Export:
        """From vLLM's view of `config.json`; CheckpointError for another version."""
        said = getattr(config, "llama_adapter", None)
        if not isinstance(said, dict) or said.get("format_version") != FORMAT_VERSION:
            found = said.get("format_version") if isinstance(said, dict) else None
            raise CheckpointError(
                f"config.json is of export version {found}, this plugin reads {FORMAT_VERSION}: "
                "export the adapter again"
            )
        return cls(
            adapter=AdapterConfig.from_dict(said["adapter"]),
            placeholder_text=said["placeholder_text"],
            placeholder_ids=tuple(said["placeholder_ids"]),
        )

    @property
    def num_visual_tokens(self) -> int:
        """Visual prompts that a layer attends to for each image."""
        config = self.adapter
        return config.prompt_length if config.fusion == "late" else config.visual_prompt_length


def check_export(directory: Path) -> None:
    """CheckpointError for a directory that is not an export, or not a whole one."""
    marker = directory / EXPORT_MARKER
    if not marker.is_file():
        raise CheckpointError(
            f"{directory} lacks {EXPORT_MARKER}: not an export of "
            "`llama-adapter export --format vllm`"
        )
    said = read_json_object(marker, error=CheckpointError)
    if said.get("format") != "vllm" or said.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{marker} is of format {said.get('format')!r} {said.get('format_version')!r}, "
            f"expected 'vllm' {FORMAT_VERSION}"
        )
    for name, size in said["sizes"].items():
        path = directory / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            raise CheckpointError(f"{path} has {found} bytes, expected {size}: export it again")
    for name, expected in said["sha256"].items():
        with (directory / name).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                raise CheckpointError(f"{directory / name} is damaged: its checksum differs")
