"""vLLM plugin: serves what `llama-adapter export --format vllm` writes.

vLLM calls `register` in each of its processes, more than once.
"""

from __future__ import annotations

VLLM_VERSIONS = ("0.32",)
"""Minor releases that the plugin was tried with: vLLM's internals change with each."""

_MODULE = "llama_adapter_vllm.models"
ARCHITECTURES = (
    "LlamaAdapterTextForCausalLM",
    "LlamaAdapterPlaceholdersForConditionalGeneration",
    "LlamaAdapterCrossAttentionForConditionalGeneration",
)


def register() -> None:
    """Make the architectures of exports known to vLLM; RuntimeError for another vLLM."""
    import vllm

    check_version(vllm.__version__)
    # what is imported from here on moves from release to release
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from llama_adapter_vllm.config import EagerExportConfig, ExportConfig

    known = ModelRegistry.get_supported_archs()
    for name in ARCHITECTURES:
        if name not in known:
            # by name: importing the model here would start CUDA in the wrong process
            ModelRegistry.register_model(name, f"{_MODULE}:{name}")
        compiles = "CrossAttention" not in name
        MODELS_CONFIG_MAP[name] = ExportConfig if compiles else EagerExportConfig


def check_version(version: str) -> None:
    """RuntimeError for a vLLM that the plugin was not tried with."""
    if ".".join(version.split(".")[:2]) not in VLLM_VERSIONS:
        raise RuntimeError(
            f"llama-adapter-vllm works with vLLM {', '.join(VLLM_VERSIONS)}, found "
            f"{version}: install one of these, or uninstall the plugin"
        )
