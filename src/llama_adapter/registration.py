"""Our classes in transformers' Auto tables, without importing either side early.

The Auto classes keep tables of class *names* and import `transformers.models.<model type>` when a
name is looked up. We add our names to those tables and let `transformers.models.llama_adapter`
mean this package, whose attributes are imported on first use. The documented `register` methods
take classes, so `import llama_adapter` would import torch; and the image-text-to-text pipeline
checks the tables, not what was registered.

Tables of modules that are imported already are extended at once, the others when they are.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

MODEL_TYPE = "llama_adapter"
_CONFIG = "LlamaAdapterConfig"
_ALIAS = f"transformers.models.{MODEL_TYPE}"
_TABLES = {
    "transformers.models.auto.configuration_auto": {
        "CONFIG_MAPPING_NAMES": _CONFIG,
    },
    "transformers.models.auto.modeling_auto": {
        "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES": "LlamaAdapterForConditionalGeneration",
    },
    "transformers.models.auto.processing_auto": {
        "PROCESSOR_MAPPING_NAMES": "LlamaAdapterProcessor",
    },
}


def register(package: ModuleType) -> None:
    """Make the Auto classes find `package`'s classes, now or once transformers is imported."""
    sys.modules[_ALIAS] = package
    for name in _TABLES:
        if name in sys.modules:
            _extend_tables(sys.modules[name])
    if not any(isinstance(finder, _TableFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TableFinder())


def _extend_tables(module: ModuleType) -> None:
    for table, class_name in _TABLES[module.__name__].items():
        getattr(module, table)[MODEL_TYPE] = class_name
    for mapping in list(vars(module).values()):
        # made before us, a mapping has inverted the table of configurations already
        inverse = getattr(mapping, "_reverse_config_mapping", None)
        if isinstance(inverse, dict):
            inverse[_CONFIG] = MODEL_TYPE


class _TableFinder(MetaPathFinder):
    """Extends a module's tables as soon as the module has run; touches no other import."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        if fullname not in _TABLES:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        run_module = spec.loader.exec_module

        def run_and_extend(module: ModuleType) -> None:
            run_module(module)
            _extend_tables(module)

        spec.loader.exec_module = run_and_extend  # type: ignore[method-assign]
        return spec
