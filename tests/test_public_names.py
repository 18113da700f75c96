"""The package's surface, and that importing it stays cheap."""

from __future__ import annotations

import re
import subprocess
import sys
import time

import pytest

import llama_adapter
from llama_adapter import LlamaAdapterError

HEAVY = ("torch", "transformers", "numpy", "PIL", "pydantic", "yaml", "rich.progress")
BUDGET = 0.5
"""Seconds for an import or for `--help` (the best of three tries: machines are shared)."""


def run(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_every_public_name_exists() -> None:
    assert sorted(llama_adapter.__all__) == llama_adapter.__all__
    for name in llama_adapter.__all__:
        assert getattr(llama_adapter, name) is not None
        assert name in dir(llama_adapter)


def test_there_is_no_other_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'LLamaAdapterConfig'"):
        _ = llama_adapter.LLamaAdapterConfig


def test_every_error_is_ours_and_drawn_in_the_tree() -> None:
    import llama_adapter.errors

    classes = [
        value
        for value in vars(llama_adapter.errors).values()
        if isinstance(value, type) and issubclass(value, Exception)
    ]
    drawn = re.findall(r"\w+Error", llama_adapter.errors.__doc__ or "")
    for error in classes:
        assert issubclass(error, LlamaAdapterError)
        assert error.__name__ in drawn
        assert error.__name__ in llama_adapter.__all__


def test_a_missing_dependency_names_the_command() -> None:
    error = llama_adapter.MissingDependencyError("av", extra="video", purpose="reading videos")
    assert "pip install 'llama-adapter[video]'" in str(error)


@pytest.mark.parametrize("module", ["llama_adapter", "llama_adapter.config", "llama_adapter.cli"])
def test_importing_loads_nothing_heavy(module: str) -> None:
    loaded = run(f"import sys, {module}; print(*[m for m in {HEAVY} if m in sys.modules])")
    assert loaded == ""


def test_importing_takes_less_than_half_a_second() -> None:
    code = (
        "import time; t = time.perf_counter(); import llama_adapter; print(time.perf_counter() - t)"
    )
    assert min(float(run(code)) for _ in range(3)) < BUDGET


def test_help_takes_less_than_half_a_second() -> None:
    def once() -> float:
        start = time.perf_counter()
        run(
            "import sys; sys.argv = ['llama-adapter', '--help']\n"
            "from llama_adapter.cli import main; main()"
        )
        return time.perf_counter() - start

    assert min(once() for _ in range(3)) < BUDGET


@pytest.mark.parametrize(
    "imports",
    [
        "import llama_adapter, transformers",
        "import transformers, llama_adapter",
        "from transformers import AutoModelForImageTextToText, AutoProcessor; import llama_adapter",
        "import llama_adapter.errors",
    ],
)
def test_auto_classes_know_us_whatever_is_imported_first(imports: str) -> None:
    code = f"""
{imports}
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.auto.processing_auto import processor_class_from_name
config = AutoConfig.for_model("llama_adapter")
print(type(config).__module__)
print(AutoModelForImageTextToText._model_mapping[type(config)].__module__)
print(processor_class_from_name("LlamaAdapterProcessor").__module__)
"""
    assert run(code).split() == [
        "llama_adapter.model.configuration",
        "llama_adapter.model.adapted",
        "llama_adapter.processing.processor",
    ]
