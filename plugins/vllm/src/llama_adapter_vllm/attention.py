"""Gated prompt attention beside vLLM's own attention of the Llama family.

Shapes: T tokens of all requests of a pass, H query heads of this rank, M prompts, D head size,
d hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import CrossAttention
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer
from vllm.model_executor.models.utils import extract_layer_index

from llama_adapter_vllm.export import Export


def load_heads(parameter: nn.Parameter, loaded: Tensor) -> None:
    """This rank's heads of a tensor whose first dimension is all heads.

    Key and value heads fewer than ranks are on several of them.
    """
    rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    start = rank * len(loaded) // ranks
    parameter.data.copy_(loaded[start : start + len(parameter)])


def _head_parameter(*shape: int, dtype: torch.dtype | None = None) -> nn.Parameter:
    parameter = nn.Parameter(torch.zeros(*shape, dtype=dtype), requires_grad=False)
    parameter.weight_loader = load_heads
    return parameter


class StaticPromptAttention(LlamaAttention):
    """Attention of a layer that may carry static prompts."""

    def __init__(self, config: Any, *args: Any, prefix: str = "", **kwargs: Any) -> None:
        super().__init__(config, *args, prefix=prefix, **kwargs)
        adapter = Export.of(config).adapter
        self.layer = extract_layer_index(prefix)
        self.has_static = self.layer in adapter.prompt_layer_indices(config.num_hidden_layers)
        if self.has_static:
            shape = (self.num_heads, adapter.prompt_length, self.head_dim)
            self.prompt_keys, self.prompt_values = _head_parameter(*shape), _head_parameter(*shape)

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        qkv, _ = self.qkv_proj(hidden_states)
        query, key, value = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        query, key = self.rotary_emb(positions, query, key)
        attended = self.attn(query, key, value)
        if self.has_static:
            attended = attended + self.static_part(query)
        return self.o_proj(attended)[0]

    def static_part(self, query: Tensor) -> Tensor:
        """What static prompts add, [T, H·D]; their gates are in the values."""
        query_HTD = query.view(-1, self.num_heads, self.head_dim).transpose(0, 1)
        added_HTD = F.scaled_dot_product_attention(
            query_HTD.unsqueeze(0),
            self.prompt_keys.unsqueeze(0),
            self.prompt_values.unsqueeze(0),
            scale=self.scaling,
        )[0]
        return added_HTD.transpose(0, 1).reshape(query.shape)


class VisualPromptAttention(StaticPromptAttention):
    """Attention of a layer that may read visual prompts, which bypass LoRA."""

    def __init__(self, config: Any, *args: Any, prefix: str = "", **kwargs: Any) -> None:
        super().__init__(config, *args, prefix=prefix, **kwargs)
        adapter = Export.of(config).adapter
        self.is_late = adapter.fusion == "late" and self.has_static
        self.is_visual = self.is_late or self.layer in adapter.visual_layer_indices()
        self.low_rank: list[str] = []
        if not self.is_visual:
            return
        self.visual_gate = _head_parameter(self.num_heads, dtype=torch.float32)
        rank, targets = adapter.lora_rank, adapter.lora_targets
        for name in ("key", "value") if rank else ():
            if targets == "all" or f"{name[0]}_proj" in targets:
                self.low_rank.append(name)
                up = _head_parameter(self.num_kv_heads, self.head_dim, rank, dtype=torch.float32)
                shape = (rank, self.hidden_size)
                down = nn.Parameter(torch.zeros(shape, dtype=torch.float32), requires_grad=False)
                self.register_parameter(f"{name}_lora_up", up)
                self.register_parameter(f"{name}_lora_down", down)

    def visual_keys_values(self, prompts_Md: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of visual prompts, [M, G·D], without what LoRA adds to the linears."""
        projected = self.qkv_proj(prompts_Md)[0]
        keys, values = projected[:, self.q_size :].split(self.kv_size, dim=-1)
        found = {"key": keys, "value": values}
        for name in self.low_rank:
            up, down = getattr(self, f"{name}_lora_up"), getattr(self, f"{name}_lora_down")
            added = F.linear(F.linear(prompts_Md.to(down.dtype), down), up.flatten(0, 1))
            found[name] = (found[name] - added).to(projected.dtype)
        return found["key"].contiguous(), found["value"].contiguous()


class PlaceholderAttention(VisualPromptAttention):
    """Attention whose placeholder tokens attend to one visual prompt each.

    A softmax over one key is 1: what an image adds behind `o_proj` is known before decoding.
    """

    def image_part(self, prompts_Md: Tensor) -> Tensor:
        """`s ⊙ W_o (g ⊙ v_P)` of visual prompts, [M, d]."""
        _, values = self.visual_keys_values(prompts_Md)
        values_MGD = values.view(-1, self.num_kv_heads, self.head_dim)
        values_MHD = values_MGD.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1)
        gated_MHD = (values_MHD * self.visual_gate[:, None]).to(values.dtype)
        added_Md = self.o_proj(gated_MHD.flatten(1))[0]
        return added_Md if self.o_proj.bias is None else added_Md - self.o_proj.bias


class CrossPromptAttention(VisualPromptAttention):
    """Attention that reads an image's prompts as an encoder's tokens, from vLLM's cache.

    Early fusion: they stand alone in the first layers. Late fusion: they are added to the static
    prompts, which remain what a request without an image reads.
    """

    def __init__(self, config: Any, *args: Any, prefix: str = "", **kwargs: Any) -> None:
        super().__init__(config, *args, prefix=prefix, **kwargs)
        if self.is_late:
            adapter = Export.of(config).adapter
            shape = (adapter.prompt_length, self.hidden_size)
            self.prompt = nn.Parameter(torch.zeros(shape, dtype=torch.float32), requires_grad=False)
        if self.is_visual:
            self.visual = CrossAttention(
                self.num_heads,
                self.head_dim,
                self.scaling,
                num_kv_heads=self.num_kv_heads,
                cache_config=kwargs.get("cache_config"),
                prefix=f"{prefix}.visual",
            )

    def forward(
        self, positions: Tensor, hidden_states: Tensor, visual_prompts: Tensor | None = None
    ) -> Tensor:
        qkv, _ = self.qkv_proj(hidden_states)
        query, key, value = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        query, key = self.rotary_emb(positions, query, key)
        attended = self.attn(query, key, value)
        if self.is_visual:
            added, reads_T = self.image_part(query, visual_prompts)
            without = self.static_part(query) if self.is_late else torch.zeros_like(added)
            # what the kernel makes of a request without encoder tokens is not used
            attended = attended + (
                without if reads_T is None else torch.where(reads_T[:, None], added, without)
            )
        elif self.has_static:
            attended = attended + self.static_part(query)
        return self.o_proj(attended)[0]

    def image_part(
        self, query: Tensor, visual_prompts: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """What images add, [T, H·D], and which tokens have one; None where none can be known."""
        keys = values = None
        if visual_prompts is not None:  # the first pass of a request; later ones read the cache
            if self.is_late:
                images = visual_prompts.view(-1, *self.prompt.shape)
                visual_prompts = (images.float() + self.prompt).flatten(0, 1)
            keys, values = self.visual_keys_values(visual_prompts.to(query.dtype))
        added = self.visual(query.contiguous(), keys, values)
        added_THD = added.view(-1, self.num_heads, self.head_dim) * self.visual_gate[:, None]
        reads_T = _has_image(self.visual.layer_name, len(query))
        return added_THD.to(query.dtype).reshape(query.shape), reads_T


def _has_image(layer_name: str, num_tokens: int) -> Tensor | None:
    """Which tokens of a pass are of requests with encoder tokens; None in a pass for profiling."""
    metadata = get_forward_context().attn_metadata
    found = metadata.get(layer_name) if isinstance(metadata, dict) else None
    if found is None:
        return None
    start, lengths = found.query_start_loc.long(), found.seq_lens
    num_queries = start[1 : len(lengths) + 1] - start[: len(lengths)]
    reads = (lengths > 0).repeat_interleave(num_queries)
    return F.pad(reads, (0, num_tokens - len(reads)))


class StaticPromptLayer(LlamaDecoderLayer):
    """A decoder layer with static prompts."""

    attention: type[LlamaAttention] = StaticPromptAttention

    def __init__(self, vllm_config: Any, prefix: str = "", config: Any = None) -> None:
        super().__init__(vllm_config, prefix, config, self.attention)

    def normed(self, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """What attention takes, and the residual."""
        if residual is None:
            return self.input_layernorm(hidden), hidden
        return self.input_layernorm(hidden, residual)

    def rest(self, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """What follows attention."""
        hidden, residual = self.post_attention_layernorm(hidden, residual)
        return self.mlp(hidden), residual


class PlaceholderLayer(StaticPromptLayer):
    """A decoder layer that adds what images give to their placeholders."""

    attention = PlaceholderAttention

    def keep_image_parts(self, parts_Td: Tensor) -> None:
        """What to add in each pass; a buffer, so that a compiled graph reads it where it is."""
        self.register_buffer("image_parts", parts_Td, persistent=False)

    def forward(
        self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        hidden, residual = self.normed(hidden_states, residual)
        hidden = self.self_attn(positions, hidden)
        if self.self_attn.is_visual:
            hidden = hidden + self.image_parts[: hidden.shape[0]]
        return self.rest(hidden, residual)


class CrossPromptLayer(StaticPromptLayer):
    """A decoder layer whose attention reads images as encoder tokens."""

    attention = CrossPromptAttention

    def forward(
        self,
        positions: Tensor,
        hidden_states: Tensor,
        residual: Tensor | None,
        visual_prompts: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        hidden, residual = self.normed(hidden_states, residual)
        return self.rest(self.self_attn(positions, hidden, visual_prompts), residual)
