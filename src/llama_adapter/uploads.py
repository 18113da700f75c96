"""Uploading what `save_pretrained` writes to a repository on the Hugging Face hub."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi

CARD = "README.md"


def push_folder(
    save: Callable[[Path], Any],
    repo_id: str,
    *,
    what: str,
    card: Callable[[str], str] | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
) -> str:
    """Upload what `save` writes into a directory; returns the address of the commit.

    `card` makes the text of a model card by the repository's name, where that has none.
    """
    with TemporaryDirectory() as name:
        folder = Path(name)
        save(folder)
        for path in folder.rglob("*.json"):
            _forget_paths(path)
        hub = HfApi(token=token)
        repository = hub.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/"):
            hub.create_branch(repository, branch=revision, exist_ok=True)
        (folder / CARD).unlink(missing_ok=True)  # it names this folder, not the repository
        if card is not None and not hub.file_exists(repository, CARD, revision=revision):
            (folder / CARD).write_text(card(repository), encoding="utf-8")
        commit = hub.upload_folder(
            repo_id=repository,
            folder_path=folder,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message or f"Upload {what}",
            commit_description=commit_description,
        )
    return str(commit)


def _forget_paths(path: Path) -> None:
    """Take the directories of this machine out of settings, which peft and tokenizers note."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        return
    noted = [key for key, value in content.items()
             if key.endswith("name_or_path") and isinstance(value, str)
             and (Path(value).is_absolute() or Path(value).exists())]  # fmt: skip
    if noted:
        text = json.dumps({**content, **dict.fromkeys(noted)}, indent=2, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")
