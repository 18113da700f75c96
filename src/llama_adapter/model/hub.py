"""Whether a name means a model at all, found out before anything waits for it.

transformers asks the hub for one file after another and tries each six times: without a network a
mistyped name would be a minute's silence, and then a message that does not name it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from llama_adapter.errors import CheckpointError, ConfigError
from llama_adapter.files import expanded, read_json_object
from llama_adapter.model.peft_base import PEFT_FOLDER, is_peft_folder
from llama_adapter.pretrained import explain
from llama_adapter.uploads import CARD

SECONDS = 5.0
"""How long the hub has to answer."""
_NO_ANSWER: type[Exception] = hub_errors.HTTPError  # type: ignore[attr-defined]
"""Of whichever HTTP library the installed hub client works with."""

HUB_OPTIONS = frozenset(
    {"revision", "subfolder", "token", "cache_dir", "force_download", "local_files_only"}
)
"""Loading options that say which files of the hub are meant."""
_SETTINGS = ("config.json", "adapter_config.json")
"""A repository of a model has the first, one of an adapter the second or both."""


def peft_folder(name_or_path: str) -> Path | None:
    """Folder of the peft adapter with this name or path; None where it is something else."""
    if expanded(name_or_path).exists():
        folder = Path(name_or_path)
        return folder if is_peft_folder(folder) else None
    described = fetched(name_or_path, ["adapter_config.json"])
    if described is None or not is_peft_folder(described):
        return None
    return fetched(name_or_path, ["adapter_*"])


def adapter_folder(
    name_or_path: str, *, subfolder: str | None = None, revision: str | None = None, **options: Any
) -> Path:
    """The directory of an adapter of ours by path, or by name on the hub, whose files are fetched.

    `options` are those of `snapshot_download`. Raises CheckpointError where there is none of that
    name, and ConfigError for a revision of a directory, which has none.
    """
    inner = Path(subfolder or "")
    if inner.is_absolute() or ".." in inner.parts:
        raise ConfigError(f"subfolder {subfolder!r} leads out of the adapter's repository")
    try:
        validate_repo_id(name_or_path)
        is_local = expanded(name_or_path).exists()
    except hub_errors.HFValidationError:
        is_local = True
    if is_local:
        if revision not in (None, "main"):
            raise ConfigError(f"{name_or_path} is a directory, which has no revision {revision!r}")
        return Path(name_or_path) / inner

    def files(*names: str) -> list[str]:
        return [(inner / name).as_posix() for name in names]

    def get(names: list[str]) -> Path:
        try:
            return Path(
                snapshot_download(name_or_path, revision=revision, allow_patterns=names, **options)
            )
        except (hub_errors.HfHubHTTPError, hub_errors.LocalEntryNotFoundError, _NO_ANSWER,
                OSError, ValueError) as error:  # fmt: skip
            reason = why_missing(name_or_path) or explain(error)
            raise CheckpointError(f"cannot load the adapter {name_or_path!r}: {reason}") from error

    folder = get(files("adapter_*", "config.json", CARD, f"{PEFT_FOLDER}/*")) / inner
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise CheckpointError(
            f"cannot load the adapter {name_or_path!r}: its repository has no "
            f"{(inner / path.name).as_posix()}"
        )
    described = read_json_object(path, error=CheckpointError)
    parts = [described.get(part) for part in ("base", "vision")]
    inside = [str(p.get("name_or_path") or "") for p in parts if isinstance(p, dict)]
    if brought := [f"{name}/*" for name in inside if name and ".." not in Path(name).parts]:
        get(files(*brought))
    return folder


def revision_at_hand(name: str, revision: str | None) -> str | None:
    """A recorded revision of a repository on the hub, where it is in the cache or on the hub.

    None where the name is a directory, or the revision is gone; whether the present one holds the
    same weights is then said by their fingerprint.
    """
    if revision is None or not re.fullmatch(r"[\w.-]+", revision) or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except hub_errors.HFValidationError:
        return None
    settings = "config.json"
    if isinstance(try_to_load_from_cache(name, settings, revision=revision), str):
        return revision
    return None if fetched(name, [settings], revision=revision) is None else revision


def hub_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of loading options that say which files of the hub are meant."""
    return {n: v for n, v in options.items() if n in HUB_OPTIONS and v is not None}


def fetched(name: str, files: list[str], **options: Any) -> Path | None:
    """A folder with some of the files of a repository on the hub; None where it is not there."""
    try:
        return Path(snapshot_download(name, allow_patterns=files, **options))
    except (hub_errors.HfHubHTTPError, hub_errors.LocalEntryNotFoundError, _NO_ANSWER, OSError):
        return None


def why_missing(name_or_path: str) -> str | None:
    """Why transformers can find no model of this name or path; None where it can, or may."""
    if expanded(name_or_path).exists():
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
