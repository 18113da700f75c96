"""OpenAI's CLIP vision encoder as a Hugging Face one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from llama_adapter.checkpoints.torch_files import read_tensors, why_not_finite, why_not_float
from llama_adapter.errors import CheckpointError

_NEEDED = (
    "class_embedding", "positional_embedding", "proj", "conv1.weight",
    "ln_pre.weight", "ln_pre.bias", "ln_post.weight", "ln_post.bias",
)  # fmt: skip

_TOP = {
    "class_embedding": "vision_model.embeddings.class_embedding",
    "positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "ln_post.weight": "vision_model.post_layernorm.weight",
    "ln_post.bias": "vision_model.post_layernorm.bias",
}

_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}

HEAD_SIZE = 64
"""Every head of OpenAI's encoders is 64 wide; their files do not say."""


def read_openai_clip(path: Path) -> CLIPVisionModelWithProjection:
    """The vision encoder of OpenAI's CLIP from a state dict, TorchScript archive or safetensors.

    Raises CheckpointError naming the tensor that is missing or misshapen.
    """
    tensors = {
        name.removeprefix("visual."): tensor.detach().resolve_neg()
        for name, tensor in read_tensors(path).items()
        if name.startswith("visual.")
    }
    lacks = [f"visual.{name}" for name in _NEEDED if name not in tensors]
    if lacks:
        raise CheckpointError(
            f"{path} is not a CLIP vision encoder of OpenAI (a transformer): it lacks {lacks[0]}, "
            f"found {len(tensors)} tensors under 'visual.'"
        )
    for name, tensor in tensors.items():
        if (why := why_not_float(tensor)) is not None:
            raise CheckpointError(f"{path}: tensor visual.{name} {why}")
    config = _config(path, tensors)
    for name, tensor in tensors.items():
        if (why := why_not_finite(tensor, config.dtype)) is not None:
            raise CheckpointError(f"{path}: tensor visual.{name} {why}")
    converted: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        converted.update(_convert(path, name, tensor))
    with torch.device("meta"):
        model = CLIPVisionModelWithProjection(config)
    _load(path, model, converted)
    model.config.architectures = ["CLIPVisionModelWithProjection"]
    return model.eval()


def _config(path: Path, tensors: dict[str, Tensor]) -> CLIPVisionConfig:
    conv = tensors["conv1.weight"]
    for name, axes in (("conv1.weight", 4), ("proj", 2), ("positional_embedding", 2)):
        if tensors[name].ndim != axes or 0 in tensors[name].shape:
            raise CheckpointError(
                f"{path}: tensor visual.{name} has shape {list(tensors[name].shape)}, "
                f"expected {axes} axes"
            )
    width, patch = conv.shape[0], conv.shape[-1]
    if width % HEAD_SIZE or width == 0:
        raise CheckpointError(
            f"{path}: tensor visual.conv1.weight has width {width}, "
            f"expected a multiple of {HEAD_SIZE}"
        )
    num_tokens = tensors["positional_embedding"].shape[0]
    side = round((num_tokens - 1) ** 0.5)
    if side * side + 1 != num_tokens:
        raise CheckpointError(
            f"{path}: tensor visual.positional_embedding has {num_tokens} rows, "
            "expected one more than a square number of patches"
        )
    pattern = re.compile(r"transformer\.resblocks\.(\d{1,5})\.")
    blocks = {int(match[1]) for name in tensors if (match := pattern.match(name))}
    if max(blocks, default=-1) >= len(blocks):
        raise CheckpointError(
            f"{path} has visual.transformer.resblocks.{max(blocks)}, but {len(blocks)} blocks"
        )
    c_fc = tensors.get("transformer.resblocks.0.mlp.c_fc.weight")
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width if c_fc is None or c_fc.ndim != 2 else c_fc.shape[0],
        projection_dim=tensors["proj"].shape[1],
        num_hidden_layers=1 + max(blocks, default=-1),
        num_attention_heads=width // HEAD_SIZE,
        image_size=side * patch,
        patch_size=patch,
        hidden_act="quick_gelu",
        layer_norm_eps=1e-5,
        # some values of a mixed file would lose digits in its first tensor's dtype
        dtype=conv.dtype if len({t.dtype for t in tensors.values()}) == 1 else torch.float32,
    )


def _convert(path: Path, name: str, tensor: Tensor) -> dict[str, Tensor]:
    if name == "proj":
        return {"visual_projection.weight": tensor.T.contiguous()}
    if name in _TOP:
        return {_TOP[name]: tensor}
    match = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)", name)
    if match is not None:
        layer, inner, kind = match.groups()
        prefix = f"vision_model.encoder.layers.{layer}."
        if inner == "attn.in_proj":
            if tensor.ndim == 0 or tensor.shape[0] == 0 or tensor.shape[0] % 3:
                raise CheckpointError(
                    f"{path}: tensor visual.{name} has shape {list(tensor.shape)}, "
                    "expected three times the width in rows"
                )
            thirds = zip("qkv", tensor.chunk(3), strict=True)
            return {f"{prefix}self_attn.{p}_proj.{kind}": t.contiguous() for p, t in thirds}
        if inner in _BLOCK:
            return {f"{prefix}{_BLOCK[inner]}.{kind}": tensor}
    raise CheckpointError(f"{path}: unexpected tensor visual.{name} in a CLIP vision encoder")


def _load(path: Path, model: Any, converted: dict[str, Tensor]) -> None:
    expected = dict(model.named_parameters())
    for name, parameter in expected.items():
        if name not in converted:
            raise CheckpointError(f"{path} lacks the tensor that becomes {name}")
        if converted[name].shape != parameter.shape:
            raise CheckpointError(
                f"{path}: the tensor that becomes {name} has shape "
                f"{list(converted[name].shape)}, expected {list(parameter.shape)}"
            )
    unexpected = sorted(converted.keys() - expected.keys())
    if unexpected:
        raise CheckpointError(
            f"{path} has a tensor that becomes {unexpected[0]:.80}, which its other tensors leave "
            "no place for"
        )
    # an index of positions is a buffer without weights: made again where there is memory
    model.to_empty(device="cpu")
    embeddings = model.vision_model.embeddings
    if hasattr(embeddings, "position_ids"):
        embeddings.position_ids = torch.arange(embeddings.position_embedding.num_embeddings)[None]
    dtype = model.config.dtype
    # every parameter was matched above; only the buffer of positions is missing, made just now
    model.load_state_dict(
        {name: tensor.to(dtype) for name, tensor in converted.items()}, strict=False, assign=True
    )
