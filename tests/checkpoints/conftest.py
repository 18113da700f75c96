"""Synthetic files in the released formats, of any size: what the importer reads."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

KINDS = ("v1-text", "v2-multimodal-bias", "v2-multimodal-lora-bias", "v2-chat", "v2-chat-adapter")
MULTIMODAL = KINDS[1:3]


@dataclass(frozen=True)
class World:
    """A tiny base and the released files that fit it."""

    root: Path
    dim: int = 48
    layers: int = 5
    heads: int = 6
    kv_heads: int = 6
    vocab: int = 113
    multiple_of: int = 16
    prompt_length: int = 3
    prompt_layers: int = 4
    clip_out: int = 20
    mlp_ratio: float = 4.0
    """Of the visual blocks."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further entries of params.json."""
    dtype: torch.dtype = torch.float32
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    @property
    def ffn(self) -> int:
        size = int(int(2 * 4 * self.dim / 3) * self.extra.get("ffn_dim_multiplier", 1))
        return self.multiple_of * -(-size // self.multiple_of)

    def random(self, *shape: int) -> Tensor:
        return (torch.randn(*shape, generator=self.generator) * 0.2).to(self.dtype)

    def base_tensors(self) -> dict[str, Tensor]:
        dim, kv = self.dim, self.dim // self.heads * self.kv_heads
        tensors = {
            "tok_embeddings.weight": self.random(self.vocab, dim) * 5,
            "norm.weight": 1 + self.random(dim),
            "output.weight": self.random(self.vocab, dim),
            "rope.freqs": self.random(dim // self.heads // 2),
        }
        for layer in range(self.layers):
            root = f"layers.{layer}."
            for name, shape in (
                ("attention.wq", (dim, dim)),
                ("attention.wk", (kv, dim)),
                ("attention.wv", (kv, dim)),
                ("attention.wo", (dim, dim)),
                ("feed_forward.w1", (self.ffn, dim)),
                ("feed_forward.w2", (dim, self.ffn)),
                ("feed_forward.w3", (self.ffn, dim)),
            ):
                tensors[f"{root}{name}.weight"] = self.random(*shape)
            for name in ("attention_norm", "ffn_norm"):
                tensors[f"{root}{name}.weight"] = 1 + self.random(dim)
        return tensors

    def params(self) -> dict[str, Any]:
        extra = dict(self.extra)
        if self.kv_heads != self.heads:
            extra["n_kv_heads"] = self.kv_heads
        return {
            "dim": self.dim,
            "n_heads": self.heads,
            "n_layers": self.layers,
            "multiple_of": self.multiple_of,
            "norm_eps": 1e-6,
            "vocab_size": -1,
            **extra,
        }

    def base(
        self,
        name: str = "base",
        *,
        tensors: dict[str, Tensor] | None = None,
        shards: int = 1,
        embedding_rows: bool = False,
    ) -> Path:
        """A base in Meta's layout."""
        directory = self.root / name
        directory.mkdir(parents=True)
        tensors = tensors or self.base_tensors()
        (directory / "params.json").write_text(json.dumps(self.params()))
        for shard in range(shards):
            part = {n: slice_of(n, t, shard, shards, embedding_rows) for n, t in tensors.items()}
            torch.save(part, directory / f"consolidated.{shard:02d}.pth")
        return directory

    def released(self, kind: str) -> Any:
        """The content of a released file."""
        if kind == "v1-text":
            gates = {f"layers.{i}.attention.gate": self._gate() for i in range(self.layers)}
            return {**gates, "adapter_query.weight": self._prompts()}
        if kind in MULTIMODAL:
            return self._multimodal(with_lora=kind == "v2-multimodal-lora-bias")
        tensors: dict[str, Tensor] = {}
        if kind == "v2-chat-adapter":
            tensors["adapter_query.weight"] = self._prompts()
            for layer in range(self.layers - self.prompt_layers, self.layers):
                tensors[f"layers.{layer}.attention.gate"] = self._gate()
        for layer in range(self.layers):
            for name, (out_size, in_size) in self._linears().items():
                tensors[f"layers.{layer}.{name}_bias"] = self.random(out_size)
                tensors[f"layers.{layer}.{name}_scale"] = 1 + self.random(in_size)
            for norm in ("attention_norm", "ffn_norm"):
                tensors[f"layers.{layer}.{norm}.weight"] = 1 + self.random(self.dim)
        return {"model": tensors}

    def save_released(self, kind: str, content: Any = None) -> Path:
        path = self.root / f"{kind}.pth"
        torch.save(self.released(kind) if content is None else content, path)
        return path

    def clip(self, *, out: int | None = None) -> dict[str, Tensor]:
        """A vision encoder with OpenAI's names: 16 pixels, patches of 4, width 64."""
        width, out = 64, out or self.clip_out
        tensors = {
            "class_embedding": self.random(width),
            "positional_embedding": self.random(17, width),
            "proj": self.random(width, out),
            "conv1.weight": self.random(width, 3, 4, 4),
        }
        for norm in ("ln_pre", "ln_post", *(f"transformer.resblocks.0.ln_{i}" for i in (1, 2))):
            tensors[f"{norm}.weight"] = 1 + self.random(width)
            tensors[f"{norm}.bias"] = self.random(width)
        block = "transformer.resblocks.0."
        tensors[f"{block}attn.in_proj_weight"] = self.random(3 * width, width)
        tensors[f"{block}attn.in_proj_bias"] = self.random(3 * width)
        for name, shape in (
            ("attn.out_proj", (width, width)),
            ("mlp.c_fc", (4 * width, width)),
            ("mlp.c_proj", (width, 4 * width)),
        ):
            tensors[f"{block}{name}.weight"] = self.random(*shape)
            tensors[f"{block}{name}.bias"] = self.random(shape[0])
        return {f"visual.{name}": tensor for name, tensor in tensors.items()}

    def save_clip(self, **options: Any) -> Path:
        path = self.root / "clip.pt"
        torch.save(self.clip(**options), path)
        return path

    def _linears(self) -> dict[str, tuple[int, int]]:
        dim, ffn, kv = self.dim, self.ffn, self.dim // self.heads * self.kv_heads
        return {
            "attention.wq": (dim, dim),
            "attention.wk": (kv, dim),
            "attention.wv": (kv, dim),
            "attention.wo": (dim, dim),
            "feed_forward.w1": (ffn, dim),
            "feed_forward.w2": (dim, ffn),
            "feed_forward.w3": (ffn, dim),
        }

    def _gate(self) -> Tensor:
        return self.random(1, self.heads, 1, 1) * 3

    def _prompts(self) -> Tensor:
        return self.random(self.prompt_layers * self.prompt_length, self.dim) * 5

    def _multimodal(self, *, with_lora: bool) -> dict[str, Any]:
        width, dim = 32, self.dim
        mlp = int(self.mlp_ratio * width)
        tensors = {
            "adapter_query.weight": self._prompts(),
            "visual_query.weight": self.random(self.prompt_length, width) * 5,
            "llama.norm.weight": 1 + self.random(dim),
        }
        for name, size in (
            ("clip_proj", (width, self.clip_out)),
            ("clip_proj_norm", (width,)),
            ("visual_proj", (dim, width)),
            ("visual_proj_norm", (dim,)),
            ("visual_blocks.0.norm1", (width,)),
            ("visual_blocks.0.attn.qkv", (3 * width, width)),
            ("visual_blocks.0.attn.proj", (width, width)),
            ("visual_blocks.0.norm2", (width,)),
            ("visual_blocks.0.mlp.fc1", (mlp, width)),
            ("visual_blocks.0.mlp.fc2", (width, mlp)),
        ):
            tensors[f"{name}.weight"] = self.random(*size)
            tensors[f"{name}.bias"] = self.random(size[0])
        for layer in range(self.layers):
            root = f"llama.layers.{layer}."
            tensors[f"{root}attention.gate"] = self._gate()
            if with_lora:
                tensors[f"{root}attention.new_gate"] = 1 + self.random(1, 1, 1, 1)
            for name, (out_size, in_size) in self._linears().items():
                if name not in ("attention.wk", "attention.wv"):
                    tensors[f"{root}{name}.bias"] = self.random(out_size)
                block, linear = name.split(".")
                if with_lora:
                    lora = f"{root}{block}.lora_{linear}"
                    tensors[f"{lora}_l1.weight"] = self.random(4, in_size)
                    tensors[f"{lora}_l2.weight"] = self.random(out_size, 4)
            for norm in ("attention_norm", "ffn_norm"):
                tensors[f"{root}{norm}.weight"] = 1 + self.random(dim)
        config = {"w_bias": True, "w_lora": with_lora, "lora_rank": 4}
        return {"model": tensors, "config": config}


def slice_of(name: str, tensor: Tensor, shard: int, shards: int, embedding_rows: bool) -> Tensor:
    """What one model-parallel shard holds of a tensor."""
    if tensor.ndim == 1:
        return tensor
    by_columns = name.endswith(("wo.weight", "w2.weight"))
    by_columns |= name.startswith("tok_embeddings") and not embedding_rows
    return tensor.chunk(shards, dim=1 if by_columns else 0)[shard].contiguous()


@pytest.fixture
def make_world(tmp_path: Path) -> Callable[..., World]:
    def make(*, root_name: str = "world", **options: Any) -> World:
        root = tmp_path / root_name
        root.mkdir()
        return World(root=root, **options)

    return make


@pytest.fixture
def world(make_world: Callable[..., World]) -> World:
    return make_world()


SENTENCES = (
    "the quick brown fox jumps over lazy dogs Below is an instruction that describes task "
    "Write response completes request Generate caption of this image ### ###Human: ###Assistant:"
)
WORDS = SENTENCES.split()


@pytest.fixture(scope="session")
def sentencepiece_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BPE model with byte fallback and Meta's special pieces."""
    import sentencepiece

    root = tmp_path_factory.mktemp("spm")
    chooser = random.Random(0)
    lines = [" ".join(chooser.choices(WORDS, k=12)) for _ in range(300)]
    (root / "corpus.txt").write_text("\n".join(lines))
    sentencepiece.SentencePieceTrainer.train(
        input=str(root / "corpus.txt"),
        model_prefix=str(root / "tokenizer"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        normalization_rule_name="identity",
        split_digits=True,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    return root / "tokenizer.model"
