"""No directory can make this package run code or ask on standard input whether it may."""

from __future__ import annotations

import ast
import io
import json
import shutil
import sys
from pathlib import Path

import pytest

import llama_adapter
from llama_adapter import CheckpointError
from llama_adapter.errors import LlamaAdapterError
from llama_adapter.evaluation.judges import LocalJudge
from llama_adapter.experts.pipelines import load_pipeline
from llama_adapter.model.references import (
    PACKAGE_ROOT,
    load_language_model,
    load_vision,
    package_reference,
    resolve_reference,
)

MARKER = "executed"
CODE = f"from pathlib import Path\nPath(__file__).with_name({MARKER!r}).touch()\n"
_AUTO = ("Config", "Model", "ModelForCausalLM", "ModelForImageTextToText", "Processor",
         "ImageProcessor")  # fmt: skip
AUTO_MAP = {
    **dict.fromkeys((f"Auto{name}" for name in _AUTO), "evil.Evil"),
    "AutoTokenizer": ["evil.Evil", "evil.Evil"],
}


class Unread(io.StringIO):
    """A standard input that says yes to everything, and fails the test that reads it."""

    def readline(self, *_):
        raise AssertionError("standard input was read")

    read = __next__ = readline

    def isatty(self):
        return True


@pytest.fixture
def llama_adapter_cli(monkeypatch, capsys):
    """Run the program without a replaced standard input; its status and what it said."""
    from llama_adapter.cli import main

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["llama-adapter", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", Unread("y\n" * 100))
        with pytest.raises(SystemExit) as left:
            main()
        return left.value.code, capsys.readouterr().err

    return run


@pytest.fixture
def parts(adapter_dir, tmp_path):
    """An adapter with its base and encoder, which a test may spoil."""
    shutil.copytree(adapter_dir.parent, tmp_path / "all")
    path = tmp_path / "all/mine/adapter_config.json"
    content = json.loads(path.read_text())
    del content["processor"]  # its record would find the change before any loader does
    for key, name in (("base", "base"), ("vision", "vision")):
        shutil.move(tmp_path / "all" / name, tmp_path / "all/mine" / name)
        content[key]["name_or_path"] = name
    path.write_text(json.dumps(content))
    return tmp_path / "all/mine"


def spoil(directory, name, **changes):
    """Let a JSON file of the directory ask for code, which lies beside it."""
    path = directory / name
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**content, "auto_map": AUTO_MAP, **changes}))
    for module in ("evil.py", "generate.py"):
        (directory / module).write_text(CODE)
    (directory / "custom_generate").mkdir(exist_ok=True)
    (directory / "custom_generate" / "generate.py").write_text(CODE)


HOSTILE = {
    "base": ("base", "config.json", {"model_type": "evil"}),
    "encoder": ("vision", "config.json", {"model_type": "evil"}),
    "tokenizer": (".", "tokenizer_config.json", {"tokenizer_class": "EvilTokenizer"}),
    "adapter": (".", "config.json", {"model_type": "evil"}),
    "processor": (".", "processor_config.json", {"processor_class": "EvilProcessor"}),
    "image processor": (".", "processor_config.json", {"image_processor": {
        "image_processor_type": "EvilImageProcessor", "auto_map": AUTO_MAP}}),
}  # fmt: skip


@pytest.mark.parametrize("command", ["chat", "info"])
@pytest.mark.parametrize("what", HOSTILE)
def test_a_directory_that_brings_code(what, command, parts, llama_adapter_cli):
    inner, name, changes = HOSTILE[what]
    spoil(parts / inner, name, **changes)
    options = ("--prompt", "hello") if command == "chat" else ()
    status, said = llama_adapter_cli(command, parts, *options)
    assert list(parts.rglob(MARKER)) == []
    needs_it = command == "chat" and what not in {"adapter", "processor"}
    assert status == (2 if needs_it else 0), said
    if needs_it:
        [line] = [line for line in said.splitlines() if line.startswith("error: ")]
        assert "Traceback" not in said
        assert "evil" in line or "Evil" in line or "code from files is never run" in line


@pytest.mark.parametrize(
    "load",
    [
        load_language_model,
        load_vision,
        lambda where: LocalJudge(where),
        lambda where: load_pipeline("image-text-to-text", where, expert="caption"),
    ],
    ids=["base", "encoder", "judge", "expert"],
)
def test_every_loader_refuses_code(load, parts, monkeypatch):
    monkeypatch.setattr(sys, "stdin", Unread("y\n" * 100))
    spoil(parts / "base", "config.json", model_type="evil")
    spoil(parts / "base", "tokenizer_config.json", tokenizer_class="EvilTokenizer")
    with pytest.raises(LlamaAdapterError, match="code from files is never run"):
        load(str(parts / "base"))
    assert list(parts.rglob(MARKER)) == []


def test_code_beside_a_known_kind_is_left_alone(parts, monkeypatch):
    """Many real bases carry modeling files although transformers has their family by now."""
    monkeypatch.setattr(sys, "stdin", Unread("y\n" * 100))
    spoil(parts / "base", "config.json")
    load_language_model(str(parts / "base"))
    assert list(parts.rglob(MARKER)) == []


@pytest.mark.parametrize(
    "reference",
    [
        "package:evil.x/y",
        "package:evil/y",
        "package:llama_adapter.miniature/bases",
        "package:llama_adapter",
        "package:llama_adapter/../evil",
        "package:llama_adapter/miniature/../../evil",
        "package:llama_adapter/toyworld/../../evil",
        "package:llama_adapter//etc",
        "package:llama_adapter/nowhere",
        "package:llama_adapter/config.py",
        "package:",
        "package:os",
        "a\x00b",
        "a\nb",
    ],
)
def test_a_package_reference_means_this_package_alone(
    reference, parts, tmp_path, monkeypatch, llama_adapter_cli
):
    (tmp_path / "evil/x").mkdir(parents=True)
    (tmp_path / "evil/y").mkdir()
    (tmp_path / "evil/__init__.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(CheckpointError):
        resolve_reference(reference)
    content = json.loads((parts / "adapter_config.json").read_text())
    content["base"]["name_or_path"] = reference
    (parts / "adapter_config.json").write_text(json.dumps(content))
    status, said = llama_adapter_cli("chat", parts, "--prompt", "hello")
    assert (status, said.count("error: ")) == (2, 1)
    llama_adapter_cli("info", parts)
    assert "evil" not in sys.modules
    assert not (tmp_path / "evil" / MARKER).exists()


def test_package_references_of_today_mean_what_they_did():
    for inner in ("miniature/bases/decoder", "miniature/adapters/v2"):
        reference = f"package:llama_adapter/{inner}"
        assert Path(resolve_reference(reference)) == PACKAGE_ROOT / inner
        assert package_reference(str(PACKAGE_ROOT / inner)) == reference
        earlier = reference.replace("miniature", "toyworld")  # as adapters saved before name it
        assert resolve_reference(earlier) == resolve_reference(reference)


def test_every_loader_of_transformers_goes_through_one_place():
    """Whatever loads by name elsewhere in the package would decide about code on its own."""
    classes = {"LlamaAdapterForConditionalGeneration", "LlamaAdapterProcessor",
               "LlamaAdapterConfig", "LoraConfig", "PeftConfig"}  # fmt: skip
    calls = []
    for path in sorted(Path(llama_adapter.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Attribute) or node.attr != "from_pretrained":
                continue
            owner = node.value
            name = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "?")
            if name not in classes:
                calls.append((path.name, name))
    assert calls == [("pretrained.py", "loader")]


def test_pipelines_are_made_without_code():
    found = 0
    for path in sorted(Path(llama_adapter.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "pipeline":
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert given.get("trust_remote_code") == "False", path
                found += 1
    assert found == 1
