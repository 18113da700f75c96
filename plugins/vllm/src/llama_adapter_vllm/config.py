"""What the plugin changes in vLLM's own configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from llama_adapter_vllm.export import check_export

logger = init_logger(__name__)


class AdapterModelConfig(VerifyAndUpdateConfig):
    """Checks the export before any process is started for it, and switches compilation off."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Prompts enter as arguments whose sizes the compiled graph would take as fixed."""
        check_export(Path(vllm_config.model_config.model))
        if not vllm_config.model_config.enforce_eager:
            logger.info("llama-adapter-vllm: enforce_eager is set, compiled mode is not supported")
            vllm_config.model_config.enforce_eager = True
