"""What the plugin changes in vLLM's own configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llama_adapter.errors import ConfigError
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from llama_adapter_vllm.export import check_export

logger = init_logger(__name__)


class ExportConfig(VerifyAndUpdateConfig):
    """Checks the export before any process is started for it."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        check_export(Path(vllm_config.model_config.model))
        if (stages := vllm_config.parallel_config.pipeline_parallel_size) > 1:
            raise ConfigError(
                f"pipeline_parallel_size is {stages}, expected 1: the plugin's layers are not "
                "split into stages (tensor parallel is)"
            )


class EagerExportConfig(ExportConfig):
    """Switches compilation off, too."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """An image's prompts come in some passes alone, and which tokens read them is found in
        vLLM's attention metadata: neither has a place in one graph.
        """
        ExportConfig.verify_and_update_config(vllm_config)
        if not vllm_config.model_config.enforce_eager:
            logger.info("llama-adapter-vllm: enforce_eager is set, cross-attention is not compiled")
            vllm_config.model_config.enforce_eager = True
