"""The adapted model without its head, for trainers that score hidden states themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from llama_adapter.model.modeling import LlamaAdapterForConditionalGeneration


class Backbone(nn.Module):
    """Hidden states for the same inputs as the model's forward, images included.

    It owns no parameters: the model's are reached through it, and have their names there alone.
    """

    def __init__(self, model: LlamaAdapterForConditionalGeneration) -> None:
        super().__init__()
        # in a tuple: a reference, not a child whose parameters would count twice
        self._model = (model,)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        logits_to_keep: int | Tensor = 0,  # noqa: ARG002
        **kwargs: Any,
    ) -> Any:
        """What the decoder gives, `last_hidden_state` [B, T, d] first.

        As decoders of transformers do, it takes `logits_to_keep` and gives every hidden state:
        there are no logits.
        """
        model = self._model[0]
        inputs = model.decoder_inputs(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        return model.adapter.call(model.get_decoder(), **inputs)

    @property
    def config(self) -> Any:
        return self._model[0].get_decoder().config

    def get_input_embeddings(self) -> nn.Module:
        return self._model[0].get_input_embeddings()

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        self._model[0].gradient_checkpointing_enable(*args, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        self._model[0].gradient_checkpointing_disable()
