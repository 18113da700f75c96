"""llama.cpp computes from our GGUF files what the adapted models compute.

Run by `make gguf-test`, which builds llama-cpp-python.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.checkpoints.chat_adapters import (
    LLAMA3,
    SMALL,
    byte_level,
    chat_adapter,
    with_byte_tokens,
)
from transformers import LlamaConfig, MistralConfig, Qwen2Config

from llama_adapter.chat import ChatSession
from llama_adapter.checkpoints.gguf_export import export_gguf
from llama_adapter.generation import GenerationSettings
from llama_adapter.processing.processor import LlamaAdapterProcessor

ANSWER = Path(__file__).with_name("answer.py")
PYTHON = os.environ.get("LLAMA_CPP_PYTHON", sys.executable)
"""Where llama-cpp-python is, if not here."""
TEXTS = ["the user answers", "The question: naïve  spaces?\n\n", "</s> is a word here"]
QUESTIONS = ["what is the question", "Model?"]
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}

CASES = {
    "llama": (LlamaConfig(**SMALL), byte_level),
    "llama with bytes as tokens": (LlamaConfig(**SMALL), with_byte_tokens),
    "llama 3": (LlamaConfig(**SMALL, rope_parameters=LLAMA3, tie_word_embeddings=True), byte_level),
    "linear rope": (
        LlamaConfig(**SMALL, rope_parameters={**PLAIN, "rope_type": "linear", "factor": 2.0}),
        byte_level,
    ),
    "mistral": (MistralConfig(**SMALL, sliding_window=None), byte_level),
    "qwen2": (Qwen2Config(**SMALL), byte_level),
}


@pytest.mark.parametrize("name", CASES)
def test_logits_tokens_and_answers(name: str, tmp_path: Path) -> None:
    config, tokenizer = CASES[name]
    model = chat_adapter(tmp_path, config, tokenizer=tokenizer())
    model.prepare_for_inference()
    processor = LlamaAdapterProcessor.from_pretrained(tmp_path / "adapter")
    report = export_gguf(tmp_path / "adapter", out=tmp_path / "out")
    tokens = torch.randint(3, 300, (40,), generator=torch.Generator().manual_seed(0))
    found = _ask_llama_cpp(report.file, tokens=tokens.tolist(), stop=list(report.stop))
    with torch.no_grad():
        expected = model(input_ids=tokens.unsqueeze(0)).logits[0].numpy()
    difference = np.abs(np.array(found["logits"]) - expected).max()
    print(f"{name}: largest difference of logits {difference:.2e}")
    assert difference < 1e-5 * np.abs(expected).max()
    assert found["tokens"] == [processor.tokenizer(text).input_ids for text in TEXTS]
    settings = GenerationSettings(max_new_tokens=12)
    answers = [ChatSession(model, processor, settings=settings).ask(q).text for q in QUESTIONS]
    assert [answer.strip() for answer in found["answers"]] == answers


def _ask_llama_cpp(file: Path, **asked: Any) -> dict[str, Any]:
    done = subprocess.run(
        [PYTHON, str(ANSWER), str(file)],
        input=json.dumps({"texts": TEXTS, "questions": QUESTIONS, **asked}),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    answered: dict[str, Any] = json.loads(done.stdout)
    return answered
