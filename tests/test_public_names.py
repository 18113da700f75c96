"""The package's surface, and that importing it stays cheap."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

import llama_adapter
from llama_adapter import LlamaAdapterError

HEAVY = ("torch", "transformers", "numpy", "PIL", "pydantic", "yaml", "rich.progress")


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


def test_help_loads_nothing_heavy() -> None:
    """What keeps it under half a second (`docs/speed.md`)."""
    loaded = run(
        "import sys; sys.argv = ['llama-adapter', '--help']\n"
        "from llama_adapter.cli import main\n"
        "try: main()\n"
        f"finally: print('loaded:', *[m for m in {HEAVY} if m in sys.modules])"
    )
    assert loaded.splitlines()[-1] == "loaded:"


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
        "llama_adapter.model.modeling",
        "llama_adapter.processing.processor",
    ]
