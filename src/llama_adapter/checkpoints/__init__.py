"""Files of others: released adapters, base weights in Meta's layout, OpenAI's CLIP; and back."""

from llama_adapter.checkpoints.importing import ImportReport, import_released

__all__ = ["ImportReport", "import_released"]
