"""What the tests of training data share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llama_adapter import LlamaAdapterProcessor

REAL = Path(__file__).resolve().parents[3] / "shared" / "real"


@pytest.fixture(scope="session")
def real() -> Path:
    if not REAL.is_dir():
        pytest.skip("needs the data files in ../shared/real")
    return REAL


@pytest.fixture
def processor(bytes_tokenizer: Any, image_processor: Any) -> LlamaAdapterProcessor:
    return LlamaAdapterProcessor(image_processor, bytes_tokenizer, template="alpaca")
