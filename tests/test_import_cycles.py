"""No two modules import each other, by whatever way round.

import-linter's layers look at packages; this looks at modules, and counts imports within functions
and for type checkers too.
"""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import llama_adapter

ROOT = Path(llama_adapter.__file__).parent
UNTIL_DONE = ("llama_adapter.model.", "llama_adapter.miniature.")


def _modules() -> dict[str, Path]:
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


def _imported(path: Path, modules: dict[str, Path]) -> set[str]:
    """Modules of ours that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= (whole & modules.keys()) or {node.module or ""}
    return names & modules.keys()


def test_no_import_cycles() -> None:
    modules = _modules()
    graph = {name: _imported(path, modules) - {name} for name, path in modules.items()}
    for name in graph:
        if name.startswith(UNTIL_DONE):
            graph[name] = {other for other in graph[name] if not other.startswith(UNTIL_DONE)}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))
