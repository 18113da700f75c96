"""The learned projection from features of a vision encoder to visual prompts (V2 §4.2).

Shapes: I images, F frames of one, P patch tokens, C their width, M visual prompts, d hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llama_adapter.config import AdapterConfig
from llama_adapter.model.fast.attention import attention
from llama_adapter.model.groups import AdapterModule, Group, Role, Trainable


def _resample(features_IPC: Tensor, length: int) -> Tensor:
    """Average patch tokens into `length` of them, keeping their order."""
    if features_IPC.shape[1] == length:
        return features_IPC
    return F.adaptive_avg_pool1d(features_IPC.transpose(1, 2), length).transpose(1, 2)


class LinearProjector(nn.Module):
    """Resampled features, one linear, one norm: the smallest projector."""

    def __init__(self, feature_size: int, hidden_size: int, *, config: AdapterConfig) -> None:
        super().__init__()
        self.length = config.visual_prompt_length
        self.proj = nn.Linear(feature_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size)

    def forward(self, features_IPC: Tensor) -> Tensor:
        return self.norm(self.proj(_resample(features_IPC, self.length)))


class MlpProjector(nn.Module):
    """Resampled features through two linears with a GELU between, and a norm."""

    def __init__(self, feature_size: int, hidden_size: int, *, config: AdapterConfig) -> None:
        super().__init__()
        self.length = config.visual_prompt_length
        self.up = nn.Linear(feature_size, config.projector_width)
        self.down = nn.Linear(config.projector_width, hidden_size)
        self.norm = nn.LayerNorm(hidden_size)

    def forward(self, features_IPC: Tensor) -> Tensor:
        x = F.gelu(self.up(_resample(features_IPC, self.length)))
        return self.norm(self.down(x))


class TransformerBlock(nn.Module):
    """A pre-norm transformer block with fused qkv, biases and an exact GELU."""

    def __init__(self, width: int, num_heads: int, *, mlp_width: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, mlp_width)
        self.fc2 = nn.Linear(mlp_width, width)

    def forward(self, x_BTW: Tensor, *, wanted: int | None = None) -> Tensor:
        """The tokens [B, T, W] after this block, or the first `wanted` of them, which see all."""
        batch, length, _ = x_BTW.shape
        qkv = self.qkv(self.norm1(x_BTW)).view(batch, length, 3, self.num_heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = attention(query[:, :, :wanted], key, value)
        x_BTW = x_BTW[:, :wanted] + self.proj(mixed.transpose(1, 2).flatten(2))
        return x_BTW + self.fc2(F.gelu(self.fc1(self.norm2(x_BTW))))


class QueryTransformer(nn.Module):
    """Learned queries and the projected features go through transformer blocks together.

    The shape of the released V2 models (there: 8 blocks, width 768, 16 heads).
    """

    def __init__(self, feature_size: int, hidden_size: int, *, config: AdapterConfig) -> None:
        super().__init__()
        width = config.projector_width
        self.feature_proj = nn.Linear(feature_size, width)
        self.feature_norm = nn.LayerNorm(width)
        self.query = nn.Parameter(torch.randn(config.visual_prompt_length, width))
        self.blocks = nn.ModuleList(
            TransformerBlock(width, config.projector_heads, mlp_width=config.projector_mlp_width)
            for _ in range(config.projector_blocks)
        )
        self.proj = nn.Linear(width, hidden_size)
        self.norm = nn.LayerNorm(hidden_size)

    def forward(self, features_IPC: Tensor) -> Tensor:
        features_IPW = self.feature_norm(self.feature_proj(features_IPC))
        query_IMW = self.query.unsqueeze(0).expand(features_IPW.shape[0], -1, -1)
        x = torch.cat([query_IMW.to(features_IPW.dtype), features_IPW], dim=1)
        last = len(self.blocks) - 1
        for index, block in enumerate(self.blocks):
            # behind the last block nothing reads the features
            x = block(x, wanted=query_IMW.shape[1] if index == last else None)
        return self.norm(self.proj(x))


PROJECTORS: dict[str, type[nn.Module]] = {
    "linear": LinearProjector,
    "mlp": MlpProjector,
    "query_transformer": QueryTransformer,
}
"""Modules from vision features [I, P, C] to visual prompts [I, M, d], M of them for every image."""


class VisualProjection(AdapterModule):
    """Vision features [I, P, C] (or [I, F, P, C] for frames) to visual prompts [I, M', d].

    M' is M, or F·M with the frame rule `concat`. Computes in float32, its parameters' dtype.
    """

    group = Group.VISION

    def __init__(self, feature_size: int, hidden_size: int, *, config: AdapterConfig) -> None:
        super().__init__()
        self.frame_rule = config.frame_rule
        self.projector = PROJECTORS[config.projector](feature_size, hidden_size, config=config)

    def trainables(self) -> Iterator[Trainable]:
        for prefix, module in self.named_modules():
            for name, parameter in module.named_parameters(prefix, recurse=False):
                is_matrix = isinstance(module, nn.Linear) and parameter is module.weight
                yield Trainable(name, parameter, Role.PROJECTION, is_matrix)

    def forward(self, features: Tensor) -> Tensor:
        features = features.to(next(self.projector.parameters()).dtype)
        if features.ndim == 3:
            return self.projector(features)
        num_images, num_frames = features.shape[:2]
        if self.frame_rule == "mean":
            return self.projector(features.mean(1))
        prompts = self.projector(features.flatten(0, 1)).unflatten(0, (num_images, num_frames))
        return prompts.mean(1) if self.frame_rule == "late-mean" else prompts.flatten(1, 2)
