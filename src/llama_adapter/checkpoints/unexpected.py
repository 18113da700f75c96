"""What a directory is that somebody gave in place of a checkpoint or a base."""

from __future__ import annotations

from pathlib import Path

from llama_adapter.errors import CheckpointError
from llama_adapter.files import read_json
from llama_adapter.model.configuration import ADAPTER_CONFIG_NAME


def what_directory(directory: Path) -> str:
    """A few words for an error message, with what can be done with it."""
    path = directory / ADAPTER_CONFIG_NAME
    if not path.is_file():
        return "a directory"
    try:
        content = read_json(path, error=CheckpointError)
    except CheckpointError:
        return f"a directory with a damaged {ADAPTER_CONFIG_NAME}"
    if not isinstance(content, dict):
        return f"a directory with a damaged {ADAPTER_CONFIG_NAME}"
    if "peft_type" in content:
        kind = str(content["peft_type"])[:40]
        return (
            f"a peft adapter ({kind}), not one of LLaMA-Adapter: merge it into its base with "
            "peft's merge_and_unload, save that and use it as a base"
        )
    if content.get("model_type") == "llama_adapter":
        base = content.get("base")
        name = str(base.get("name_or_path", ""))[:200] if isinstance(base, dict) else ""
        return f"an adapter directory already (on the base {name!r})"
    return "an adapter directory of another library"
