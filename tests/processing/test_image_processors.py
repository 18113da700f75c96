from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

from llama_adapter.errors import CheckpointError
from llama_adapter.processing.image_processors import load_image_processor


@pytest.mark.parametrize("kind", [CLIPImageProcessorPil, SiglipImageProcessorPil])
def test_a_models_own_image_processor_is_read(kind: Any, tmp_path: Path) -> None:
    made = kind(image_mean=[0.1, 0.2, 0.3])
    made.save_pretrained(tmp_path)
    read = load_image_processor(str(tmp_path))
    assert type(read) is kind
    assert list(read.image_mean) == [0.1, 0.2, 0.3]


@pytest.mark.parametrize(
    "name", ["CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPFeatureExtractor"]
)
def test_every_name_that_releases_gave_it_is_understood(name: str, tmp_path: Path) -> None:
    content = {"image_processor_type": name, "size": {"shortest_edge": 9}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    assert type(load_image_processor(str(tmp_path))) is CLIPImageProcessorPil


def test_one_that_is_missing_or_unknown_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no image processor"):
        load_image_processor(str(tmp_path))
    content = json.dumps({"image_processor_type": "MagicImageProcessor"})
    (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(CheckpointError, match="'MagicImageProcessor' is none that works"):
        load_image_processor(str(tmp_path))
