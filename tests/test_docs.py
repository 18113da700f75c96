"""What the documentation names is there: files, commands, keys of a recipe."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from typer.main import get_command

from llama_adapter.cli.app import app
from llama_adapter.config import AdapterConfig
from llama_adapter.training.recipe import Section

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("docs/**/*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
FOLDERS = ("src", "docs", "recipes", "benchmarks", "tests", "tools", "examples", "plugins")


def _named(pattern: str, *, besides: tuple[str, ...] = ()) -> set[tuple[str, ...]]:
    return {
        (page.name, *(match if isinstance(match, tuple) else (match,)))
        for page in PAGES
        if page.name not in besides
        for match in re.findall(pattern, page.read_text())
    }


def test_files_exist() -> None:
    paths = [f"/{p.relative_to(ROOT)}" for f in FOLDERS for p in (ROOT / f).rglob("*")]
    for page, name in _named(r"`([\w./-]+\.(?:py|yaml|md))`"):
        assert any(path.endswith(f"/{name}") for path in paths) or (ROOT / name).exists(), (
            f"{page} names {name}"
        )


def test_commands_exist() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    for page, name in _named(r"llama-adapter ([a-z]+)\b", besides=("ablation-results.md",)):
        assert name in commands, f"{page} names llama-adapter {name}"


def _below(kind: type[Section]) -> Iterator[type[Section]]:
    for each in kind.__subclasses__():
        yield from (each, *_below(each))


def test_keys_of_recipes_exist() -> None:
    known = {name for section in _below(Section) for name in section.model_fields}
    known |= {field.name for field in fields(AdapterConfig)}
    sections = "base|vision|adapter|prompt|data|optimizer|compute|evaluation|logging"
    named = _named(rf"`({sections})\.(?!pth|py)(\w+)[`:=]")
    assert len(named) >= 10
    for page, section, key in named:
        assert key in known, f"{page} names {section}.{key}"


def test_code_compiles_and_imports_what_there_is() -> None:
    imported = 0
    for page in PAGES:
        for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
            if code.startswith("# model/"):
                continue  # lines of ours, which tests/test_how_it_works.py compares
            for node in ast.walk(ast.parse(code, str(page))):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("llama_"):
                    module = importlib.import_module(str(node.module))
                    for alias in node.names:
                        assert hasattr(module, alias.name), f"{page.name} imports {alias.name}"
                        imported += 1
    assert imported >= 10


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
            name, _, anchor = link.partition("#")
            target = (page.parent / name).resolve() if name else page
            assert target.exists(), f"{page.name} links to {link}"
            if anchor:
                heads = re.findall(r"^#+ (.*)", target.read_text(), re.MULTILINE)
                slugs = [re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads]
                assert anchor in slugs, f"{page.name} links to {link}"
