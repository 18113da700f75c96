"""Pipelines of transformers, loaded with messages that say what is missing."""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path
from typing import Any

from PIL import Image

from llama_adapter.errors import ExpertError
from llama_adapter.files import expanded
from llama_adapter.pretrained import explain, load_pretrained
from llama_adapter.processing.image_processors import check_resize

_LOADING = threading.Lock()


def load_pipeline(
    task: str,
    model: str,
    *,
    expert: str,
    other_task: str | None = None,
    device: str | None = None,
) -> Any:
    """The pipeline of a model by name or directory, for the first of the tasks that it can do.

    It never needs torchvision if it can do without. Raises ExpertError saying what is wrong.
    """
    from transformers import AutoConfig, pipeline

    from llama_adapter.model.hub import why_missing

    path = expanded(model)
    if path.exists() and not (path / "config.json").is_file():
        raise ExpertError(f"expert {expert!r}: {model!r} holds no model (no config.json)")
    where = str(path) if path.exists() else model
    tasks = [name for name in (task, other_task) if name is not None]
    refused = f"expert {expert!r}: {model!r} is not a usable {' or '.join(tasks)} model"
    missing = why_missing(where)
    if missing is not None:
        raise ExpertError(f"{refused}: {missing}")
    try:
        # transformers imports modules as they are needed, which two threads must not do at once
        with _LOADING:
            config = load_pretrained(AutoConfig, where, what="config of", error=ExpertError)
            kind = config.model_type
            able = [name for name in tasks if kind in _model_types(name)]
            if not able:
                raise ValueError(f"transformers has no such task for models of type {kind!r}")
            chosen: Any = able[0]
            return pipeline(chosen, model=where, device=device or "cpu", trust_remote_code=False)
    except Exception as error:  # damaged files make loaders of others raise whatever they like
        reason = explain(error)
        if "torchvision" in reason.lower():
            reason = (
                "its image processor exists for torchvision alone; choose a model with a "
                "processor that works on PIL images"
            )
        raise ExpertError(f"{refused}: {reason}") from error


def _model_types(task: str) -> frozenset[str]:
    """Types of models that transformers has the task for."""
    from transformers.models.auto import modeling_auto

    name = f"MODEL_FOR_{task.upper().replace('-', '_')}_MAPPING_NAMES"
    return frozenset(getattr(modeling_auto, name))


def check_size(pipeline: Any, image: Image.Image) -> None:
    """ImageError where the pipeline's image processor would make too many pixels of the image."""
    processor = getattr(pipeline, "processor", None)
    image_processor = pipeline.image_processor or getattr(processor, "image_processor", None)
    check_resize(image_processor, *image.size)


def pipeline_version(pipeline: Any, *settings: Any) -> str:
    """A name for the model and settings; what it answers depends on nothing else."""
    config = pipeline.model.config
    described = [
        config.to_dict(),
        str(pipeline.model.dtype),
        getattr(config, "_commit_hash", None) or _weights(str(config.name_or_path)),
        settings,
    ]
    text = json.dumps(described, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _weights(directory: str) -> list[tuple[str, int, int]]:
    """Size and time of a directory's files of weights: cheap, and changes when they do."""
    files = sorted(Path(directory).glob("*.safetensors")) if directory else []
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
