"""What lmms-eval finds of us: `lmms_eval --model llama_adapter --model_args pretrained=DIR`.

The entry point `lmms_eval.models` names `manifests`; the model class is imported only when asked
for, since its base class is lmms-eval's own.
"""

from __future__ import annotations

from typing import Any


def manifests() -> list[Any]:
    """Our one model, as lmms-eval wants it announced."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [
        ModelManifest(
            model_id="llama_adapter",
            simple_class_path="llama_adapter.evaluation.lmms_model.LlamaAdapterLmms",
            aliases=("llama-adapter",),
        )
    ]
