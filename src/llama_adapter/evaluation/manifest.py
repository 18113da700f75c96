"""What a run was: enough to tell whether two runs are the same, and to run it again."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from llama_adapter.errors import EvaluationError
from llama_adapter.evaluation.jsonfiles import brief, read_json
from llama_adapter.evaluation.predictions import PREDICTIONS, SCORE_FILE, record_to_json
from llama_adapter.evaluation.records import Record
from llama_adapter.evaluation.tasks.base import Generation
from llama_adapter.files import write_atomically

MANIFEST = "manifest.json"
TASKS_WITHOUT_ANSWERS = ("miniature",)
"""Tasks that store a score alone, so a run of theirs is never taken up again."""
_SAME = ("task", "model", "records", "data_sha256", "generation", "shard")
"""What must agree where a run is taken up again."""
_SAME_SCORE = ("task", "model", "records", "data_sha256")
"""What must agree where a run starts over: what its score is a score of."""
_LATER_SETTINGS = {"top_p": 1.0, "images": "own", "beams": 1}
"""What older manifests do not say of how answers were drawn."""
_KINDS = {
    "task": str,
    "model": dict,
    "data": str,
    "records": int,
    "generation": dict,
    "frames": dict,
}


def file_checksum(path: Path) -> str:
    """SHA-256 of a file, read piece by piece."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def records_checksum(records: Sequence[Record]) -> str:
    """SHA-256 of what is asked and what is right."""
    digest = hashlib.sha256()
    for record in records:
        line = json.dumps(record_to_json(record), sort_keys=True, ensure_ascii=False)
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()


def make_manifest(
    *,
    task: str,
    model: Mapping[str, Any],
    data: Path | None,
    records: Sequence[Record],
    generation: Generation,
    shard: str | None,
    example: str,
) -> dict[str, Any]:
    """The manifest of a run that starts now; `data` is None where a task draws its own."""
    return {
        "task": task,
        "model": dict(model),
        "data": None if data is None else str(data),
        "data_sha256": records_checksum(records),
        "records": len(records),
        "generation": asdict(generation),
        "shard": shard,
        "example_prompt": example,
        "frames": {
            "count": generation.frames,
            "sampling": "middle of equal segments",
            "rule": model.get("frame_rule"),
        },
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in ("llama-adapter", "torch", "transformers", "av")},
        },
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def start_or_resume(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest, or check that the run in the folder is the same one.

    A run of a task that stores no answers starts over, in any batches, and says so in the manifest.
    EvaluationError where the folder holds answers or a score of which no manifest says whose they
    are.
    """
    if not (folder / MANIFEST).exists():
        for name, what in ((PREDICTIONS, "answers"), (SCORE_FILE, "a score")):
            path = folder / name
            if path.exists() and path.stat().st_size:
                raise EvaluationError(
                    f"{folder}: holds {what} without a {MANIFEST}, so not a run that could go on. "
                    "Choose another --out"
                )
        write_manifest(folder, manifest)
        return
    stored = read_manifest(folder)
    starts_over = manifest["task"] in TASKS_WITHOUT_ANSWERS
    for key in _SAME_SCORE if starts_over else _SAME:
        before, now = stored.get(key), json.loads(json.dumps(manifest[key]))
        if key == "generation" and isinstance(before, dict):
            before = _LATER_SETTINGS | before
        if key == "model" and starts_over:
            before, now = map(_without_directory, (before, now))
        if before != now:
            raise EvaluationError(
                f"{folder}: holds another run; {key} was {_brief(before)}, "
                f"now {_brief(now)}. Choose another --out"
            )
    if starts_over:
        write_manifest(folder, manifest)


def _without_directory(model: Any) -> Any:
    """A model by its files' checksums, where it has any: a directory is spelled in many ways."""
    if not (isinstance(model, dict) and model.get("sha256")):
        return model
    return {name: value for name, value in model.items() if name != "directory"}


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """What the answers in a folder were made with."""
    text = json.dumps(manifest, indent=2, ensure_ascii=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / MANIFEST, text + "\n")
    except OSError as error:
        raise EvaluationError(f"{folder}: cannot hold a run: {error.strerror}") from error


def merged_manifest(shards: Sequence[Path]) -> dict[str, Any]:
    """The manifest of all shards of a run; EvaluationError where they are not of the same run."""
    first, *others = map(read_manifest, shards)
    for folder, other in zip(shards[1:], others, strict=True):
        for key in _SAME:
            if key in ("task", "model", "generation") and other.get(key) != first.get(key):
                raise EvaluationError(
                    f"{folder}: is of another run than {shards[0].name}; its {key} is "
                    f"{_brief(other.get(key))}, not {_brief(first.get(key))}"
                )
    records = sum(one["records"] for one in (first, *others) if isinstance(one.get("records"), int))
    return first | {"shard": None, "records": records, "data_sha256": None}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a run, its parts of the kind that a run writes; nothing where it has none."""
    path = folder / MANIFEST
    if not path.exists():
        return {}
    stored = read_json(path)
    if not isinstance(stored, dict):
        raise EvaluationError(f"{path}: is not a manifest: {brief(stored)}")
    for name, kind in _KINDS.items():
        if not isinstance(stored.get(name), kind | None):
            found = brief(stored[name])
            raise EvaluationError(f"{path}: {name} is not as a run writes it: {found}")
    who = stored.get("model") or {}
    for name in ("directory", "model"):
        if not isinstance(who.get(name), str | None):
            raise EvaluationError(f"{path}: model.{name} must be a text, found {brief(who[name])}")
    return stored


def _brief(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)[:160]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
