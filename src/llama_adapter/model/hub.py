"""Whether a name means a model at all, found out before anything waits for it.

transformers asks the hub for one file after another and tries each six times: without a network a
mistyped name would be a minute's silence, and then a message that does not name it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from llama_adapter.model.peft_base import is_peft_folder

SECONDS = 5.0
"""How long the hub has to answer."""
_NO_ANSWER: type[Exception] = hub_errors.HTTPError  # type: ignore[attr-defined]
"""Of whichever HTTP library the installed hub client works with."""

_SETTINGS = ("config.json", "adapter_config.json")
"""A repository of a model has the first, one of an adapter the second or both."""


def peft_folder(name_or_path: str) -> Path | None:
    """Where an adapter of peft with this name or path lies; None where it is something else."""
    if Path(name_or_path).expanduser().exists():
        folder = Path(name_or_path)
        return folder if is_peft_folder(folder) else None
    described = fetched(name_or_path, ["adapter_config.json"])
    if described is None or not is_peft_folder(described):
        return None
    return fetched(name_or_path, ["adapter_*"])


def fetched(name: str, files: list[str], **options: Any) -> Path | None:
    """A folder with some of the files of a repository on the hub; None where it is not there."""
    try:
        return Path(snapshot_download(name, allow_patterns=files, **options))
    except (hub_errors.HfHubHTTPError, hub_errors.LocalEntryNotFoundError, _NO_ANSWER, OSError):
        return None


def why_missing(name_or_path: str) -> str | None:
    """Why transformers can find no model of this name or path; None where it can, or may."""
    if Path(name_or_path).expanduser().exists():
        return None
    try:
        validate_repo_id(name_or_path)
    except hub_errors.HFValidationError:
        return "there is no such directory, and on the Hugging Face hub names are owner/name"
    if any(isinstance(try_to_load_from_cache(name_or_path, f), str) for f in _SETTINGS):
        return None
    nowhere = "there is no such directory, it is not in the cache of the Hugging Face hub"
    if constants.HF_HUB_OFFLINE:
        return f"{nowhere}, and HF_HUB_OFFLINE forbids to ask the hub"
    try:
        HfApi().model_info(name_or_path, timeout=SECONDS)
    except hub_errors.RepositoryNotFoundError:
        return f"there is no such directory, and no such model for you on {constants.ENDPOINT}"
    except hub_errors.HfHubHTTPError:
        return None  # it answers, and may yet give the files
    except (_NO_ANSWER, OSError) as error:
        return f"{nowhere}, and {constants.ENDPOINT} cannot be reached: {error}"
    return None
