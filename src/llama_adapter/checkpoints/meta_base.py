"""Base weights in Meta's layout: `params.json`, `consolidated.*.pth`, one or many shards.

Model-parallel shards hold slices: of rows for wq, wk, wv, w1, w3 and output, of columns for wo and
w2; embeddings are sliced by columns up to LLaMA 2 and by rows since LLaMA 3; norms are copies.
Rotary pairs are adjacent there and half a head apart at Hugging Face: wq, wk are reordered.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from llama_adapter.checkpoints.safetensors_writer import (
    SafetensorsWriter,
    TensorSpec,
    file_names,
    split_into_files,
    supports,
    write_index,
)
from llama_adapter.checkpoints.torch_files import (
    check_archive,
    read_torch_file,
    state_dict,
    why_not_finite,
)
from llama_adapter.config import did_you_mean
from llama_adapter.errors import CheckpointError
from llama_adapter.files import read_json_object

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""

FILE_BYTES = 4 * 2**30
"""Most bytes in one file of a converted base."""

MAPPED_BYTES = 512 * 2**20
"""After this many bytes the shards are mapped again: pages that were read count as our memory."""

_ROWS, _COLUMNS, _COPY = 0, 1, None

_LAYER_TENSORS: dict[str, tuple[str, int | None]] = {
    "attention.wq.weight": ("self_attn.q_proj.weight", _ROWS),
    "attention.wk.weight": ("self_attn.k_proj.weight", _ROWS),
    "attention.wv.weight": ("self_attn.v_proj.weight", _ROWS),
    "attention.wo.weight": ("self_attn.o_proj.weight", _COLUMNS),
    "feed_forward.w1.weight": ("mlp.gate_proj.weight", _ROWS),
    "feed_forward.w2.weight": ("mlp.down_proj.weight", _COLUMNS),
    "feed_forward.w3.weight": ("mlp.up_proj.weight", _ROWS),
    "attention_norm.weight": ("input_layernorm.weight", _COPY),
    "ffn_norm.weight": ("post_attention_layernorm.weight", _COPY),
}

EMBEDDINGS, OUTPUT = "tok_embeddings.weight", "output.weight"

_COMPUTED = ("rope.freqs", ".inv_freq")
"""Endings of tensors that follow from params.json: stored by some versions, never read."""

_PARAMS = (
    "dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier",
    "norm_eps", "rope_theta", "use_scaled_rope", "rope_scale_factor",
)  # fmt: skip
_OF_RUNS = ("max_batch_size", "max_seq_len")
"""What params.json may say: about the model, and about how it was run, which is not read."""

_MOST = {"norm_eps": 0.1, "rope_theta": 1e10, "ffn_dim_multiplier": 64.0, "rope_scale_factor": 1e4}
"""Beyond this a number of params.json is damage."""

WIDEST_TIED = 3072
"""LLaMA 3.2 with 1B and 3B parameters: the only published bases whose output weights are the
embeddings. params.json does not say so, but no other has a scaled rotation and is so narrow."""


def rotary_permutation(rows: int, head_size: int) -> Tensor:
    """Row order that turns adjacent rotary pairs into halves of a head."""
    return torch.arange(rows).view(-1, head_size // 2, 2).transpose(1, 2).reshape(-1)


def hugging_face_name(name: str) -> tuple[str, bool]:
    """Hugging Face's name of a tensor of Meta's layout, and whether rows are reordered."""
    match = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
    if match is not None:
        inner, _ = _LAYER_TENSORS[match[2]]
        return f"model.layers.{match[1]}.{inner}", ".wq." in name or ".wk." in name
    top = {EMBEDDINGS: "model.embed_tokens.weight", OUTPUT: "lm_head.weight"}
    return top.get(name, "model.norm.weight"), False


@dataclass(frozen=True, kw_only=True, slots=True)
class _Source:
    """One tensor of the converted base and where it comes from."""

    spec: TensorSpec
    name: str
    """Its name in Meta's layout."""
    axis: int | None
    """Axis along which shards are joined; None: the shards hold copies."""
    head_size: int = 0
    """Width of a head if rows are reordered for rotation, else 0."""


class MetaBase:
    """A base model in Meta's layout, looked at without reading its weights.

    Checksums are compared, and values that are not finite or disagree refused, when they are read.
    Raises CheckpointError naming the file, the tensor, what was found and what was expected.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.params = _read_params(directory / "params.json")
        self.shards = _shards(directory)
        tensors = self._open()
        self.config = self._read_config(tensors)
        self._sources = list(self._plan(tensors))
        self._refuse_unexpected(tensors)
        self._is_checked = False

    @staticmethod
    def is_at(directory: Path) -> bool:
        """Whether a directory looks like Meta's layout, complete or not.

        Hugging Face repositories of Mistral hold `params.json` too, with files that say the same.
        """
        if (directory / "config.json").is_file() and any(directory.glob("model*.safetensors")):
            return False
        return (directory / "params.json").exists() or any(directory.glob("consolidated.*.pth"))

    @property
    def num_bytes(self) -> int:
        return sum(source.spec.num_bytes for source in self._sources)

    @property
    def dtype(self) -> torch.dtype:
        return self._sources[0].spec.dtype

    def convert(self, out: Path, *, progress: Progress | None = None) -> None:
        """Write sharded safetensors into `out`, tensor by tensor, and the configuration."""
        by_name = {source.spec.name: source for source in self._sources}
        files = split_into_files([s.spec for s in self._sources], max_bytes=FILE_BYTES)
        buffers = _Buffers()
        done = mapped = 0
        self._check_sums()
        shards = self._open()
        for name, specs in zip(file_names(len(files)), files, strict=True):
            with SafetensorsWriter(out / name, specs) as writer:
                for spec in specs:
                    writer.write(*self._pieces(by_name[spec.name], shards, buffers))
                    done += spec.num_bytes
                    mapped += spec.num_bytes
                    if mapped > MAPPED_BYTES:
                        shards, mapped = self._open(), 0
                    if progress is not None:
                        progress(done, self.num_bytes)
        write_index(out, files)
        self.config.save_pretrained(out)

    def read(self, name: str) -> Tensor:
        """One converted tensor by its name in the converted base."""
        source = next(s for s in self._sources if s.spec.name == name)
        self._check_sums()
        pieces = self._pieces(source, self._open(), _Buffers())
        return torch.cat(pieces).view(source.spec.shape)

    def first_shard(self) -> dict[str, Tensor]:
        """What the first shard has of every tensor by Meta's names: first rows and columns."""
        return self._open()[0]

    def _check_sums(self) -> None:
        """Compare the shards' checksums, once."""
        if not self._is_checked:
            for path in self.shards:
                check_archive(path)
        self._is_checked = True

    def _open(self) -> list[dict[str, Tensor]]:
        shards = [state_dict(path, read_torch_file(path, mmap=True)) for path in self.shards]
        for path, shard in zip(self.shards, shards, strict=True):
            if EMBEDDINGS not in shard:
                raise CheckpointError(
                    f"{path} holds no LLaMA weights: expected tensor {EMBEDDINGS}, "
                    f"found {sorted(shard)[:3]}"
                )
        return shards

    def _pieces(
        self, source: _Source, shards: list[dict[str, Tensor]], buffers: _Buffers
    ) -> list[Tensor]:
        """The rows of one converted tensor; CheckpointError for values that cannot be right."""
        for path, shard in zip(self.shards, shards, strict=True):
            # loading gives all tensors of the base the dtype of its configuration
            why = why_not_finite(shard[source.name], self.config.dtype)
            if why is not None:
                raise CheckpointError(f"{path}: tensor {source.name} {why}")
            if source.axis is _COPY and not torch.equal(shard[source.name], shards[0][source.name]):
                raise CheckpointError(
                    f"{path}: tensor {source.name} differs from its copy in {self.shards[0]}"
                )
        return _pieces(source, shards, buffers)

    def _read_config(self, shards: list[dict[str, Tensor]]) -> LlamaConfig:
        params, path = self.params, self.directory / "params.json"
        dim, heads = _integer(params, "dim", path), _integer(params, "n_heads", path)
        layers = _integer(params, "n_layers", path)
        has_kv_heads = params.get("n_kv_heads") is not None
        kv_heads = _integer(params, "n_kv_heads", path) if has_kv_heads else heads
        if dim % heads or heads % kv_heads or dim // heads % 2:
            raise CheckpointError(
                f"{path}: dim {dim}, n_heads {heads}, n_kv_heads {kv_heads} do not divide evenly"
            )
        found = 1 + max((_layer_index(name) for name in shards[0]), default=-1)
        if found != layers:
            raise CheckpointError(f"{self.shards[0]} has {found} layers, {path.name} says {layers}")
        embedding = shards[0][EMBEDDINGS]
        widths = [shard[EMBEDDINGS].shape[-1] for shard in shards if shard[EMBEDDINGS].ndim == 2]
        if len(widths) < len(shards) or dim not in (widths[0], sum(widths)):
            raise CheckpointError(
                f"{self.shards[0]}: tensor {EMBEDDINGS} has shape {list(embedding.shape)}, "
                f"expected {[*embedding.shape[:1], dim]} by {path.name}"
            )
        is_by_rows = widths[0] == dim
        vocab = sum(s[EMBEDDINGS].shape[0] for s in shards) if is_by_rows else embedding.shape[0]
        stated = params.get("vocab_size")
        if stated not in (None, -1) and _integer(params, "vocab_size", path) != vocab:
            raise CheckpointError(
                f"{self.shards[0]}: tensor {EMBEDDINGS} holds {vocab} tokens, "
                f"{path.name} says {stated!r:.80}"
            )
        theta = _number(params, "rope_theta", path, default=10000.0)
        return LlamaConfig(
            architectures=["LlamaForCausalLM"],
            hidden_size=dim,
            intermediate_size=_feed_forward_size(params, dim, path),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            vocab_size=vocab,
            rms_norm_eps=_number(params, "norm_eps", path, default=1e-5),
            rope_parameters=_rope(params, theta, dim, path),
            max_position_embeddings=_context_length(params, theta),
            tie_word_embeddings=OUTPUT not in shards[0] and self._is_tied(),
            # which token ends a text is the tokenizer's to say
            bos_token_id=None,
            eos_token_id=None,
            dtype=embedding.dtype,
        )

    def _is_tied(self) -> bool:
        """Whether a base without output weights uses its embeddings; CheckpointError if not."""
        if not self.params.get("use_scaled_rope") or self.params["dim"] > WIDEST_TIED:
            raise CheckpointError(
                f"{self.shards[0]} lacks tensor {OUTPUT}, and params.json is not that of a base "
                "whose embeddings are its output weights (LLaMA 3.2)"
            )
        return True

    def _refuse_unexpected(self, shards: list[dict[str, Tensor]]) -> None:
        """A tensor that the layout does not know would be left out: another model."""
        known = {source.name for source in self._sources}
        for path, shard in zip(self.shards, shards, strict=True):
            for name in shard:
                if name not in known and not name.endswith(_COMPUTED):
                    raise CheckpointError(
                        f"{path} has tensor {name}, which no LLaMA base in Meta's layout has"
                        f"{did_you_mean(name, known)}"
                    )

    def _plan(self, shards: list[dict[str, Tensor]]) -> Iterator[_Source]:
        config = self.config
        dim, vocab, ffn = config.hidden_size, config.vocab_size, config.intermediate_size
        head = dim // config.num_attention_heads
        kv_dim = head * config.num_key_value_heads
        is_by_columns = shards[0][EMBEDDINGS].shape[1] != dim
        sliced = _COLUMNS if is_by_columns else _ROWS
        yield self._source(shards, EMBEDDINGS, "model.embed_tokens.weight", (vocab, dim), sliced)
        shapes = {
            "wq": (dim, dim), "wk": (kv_dim, dim), "wv": (kv_dim, dim), "wo": (dim, dim),
            "w1": (ffn, dim), "w2": (dim, ffn), "w3": (ffn, dim),
            "attention_norm": (dim,), "ffn_norm": (dim,),
        }  # fmt: skip
        for layer in range(config.num_hidden_layers):
            for name, (hf_name, axis) in _LAYER_TENSORS.items():
                kind = name.split(".")[-2]
                yield self._source(
                    shards,
                    f"layers.{layer}.{name}",
                    f"model.layers.{layer}.{hf_name}",
                    shapes[kind],
                    axis,
                    head_size=head if kind in ("wq", "wk") else 0,
                )
        yield self._source(shards, "norm.weight", "model.norm.weight", (dim,), _COPY)
        if not config.tie_word_embeddings:
            yield self._source(shards, OUTPUT, "lm_head.weight", (vocab, dim), _ROWS)

    def _source(
        self,
        shards: list[dict[str, Tensor]],
        name: str,
        hf_name: str,
        shape: tuple[int, ...],
        axis: int | None,
        head_size: int = 0,
    ) -> _Source:
        for path, shard in zip(self.shards, shards, strict=True):
            if name not in shard:
                raise CheckpointError(f"{path} lacks tensor {name}")
        # slices need not be equal: an odd vocabulary leaves one shard with a row less
        found = _joined_shape([shard[name] for shard in shards], axis)
        if found != list(shape):
            raise CheckpointError(
                f"{self.shards[0]}: tensor {name} has shape {found}"
                f"{f' over {len(shards)} shards' if axis is not None and len(shards) > 1 else ''}, "
                f"expected {list(shape)} by params.json"
            )
        dtype = shards[0][name].dtype
        if not supports(dtype) or any(shard[name].dtype != dtype for shard in shards):
            raise CheckpointError(
                f"{self.shards[0]}: tensor {name} has dtype {dtype}, "
                "expected one floating-point dtype in all shards"
            )
        spec = TensorSpec(name=hf_name, shape=shape, dtype=dtype)
        return _Source(spec=spec, name=name, axis=axis, head_size=head_size)


class _Buffers:
    """Memory that is used again and again: fresh memory costs more than the copy into it."""

    def __init__(self) -> None:
        self._memory: dict[tuple[str, torch.dtype], Tensor] = {}

    def get(self, name: str, spec: TensorSpec) -> Tensor:
        """A tensor of the announced shape, its values undefined."""
        size = prod(spec.shape)
        memory = self._memory.get((name, spec.dtype))
        if memory is None or memory.numel() < size:
            memory = self._memory[name, spec.dtype] = torch.empty(size, dtype=spec.dtype)
        return memory[:size].view(spec.shape)


def _pieces(source: _Source, shards: list[dict[str, Tensor]], buffers: _Buffers) -> list[Tensor]:
    """The rows of one converted tensor, in one or more pieces."""
    pieces = [shard[source.name] for shard in shards]
    if source.axis is None:
        return pieces[:1]
    if source.axis == _ROWS and not source.head_size:
        return pieces
    joined = pieces[0]
    if len(pieces) > 1:
        joined = buffers.get("joined", source.spec)
        torch.cat(pieces, dim=source.axis, out=joined)
    if not source.head_size:
        return [joined]
    ordered = buffers.get("ordered", source.spec)
    heads = joined.view(-1, source.head_size // 2, 2, joined.shape[-1]).transpose(1, 2)
    ordered.view(heads.shape).copy_(heads)
    return [ordered]


def _read_params(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing; a base in Meta's layout has params.json next to consolidated.*.pth"
        )
    params = read_json_object(path, error=CheckpointError)
    for key in params:
        if key not in (*_PARAMS, *_OF_RUNS):
            raise CheckpointError(
                f"{path}: unknown key {key!r:.80}{did_you_mean(key, _PARAMS)}; "
                f"a LLaMA base has {', '.join(_PARAMS)}"
            )
    scaled = params.get("use_scaled_rope")
    if not isinstance(scaled, bool | None):
        raise CheckpointError(
            f"{path}: use_scaled_rope must be true or false, found {scaled!r:.80}"
        )
    return params


def _integer(params: dict[str, Any], key: str, path: Path) -> int:
    value = params.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
        raise CheckpointError(f"{path}: {key} must be a positive integer, found {value!r:.80}")
    return value


def _number(params: dict[str, Any], key: str, path: Path, *, default: float) -> float:
    """A positive number; null is as good as absent."""
    value = default if params.get(key) is None else params[key]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not value > 0:
        raise CheckpointError(f"{path}: {key} must be a positive number, found {value!r:.80}")
    if value > _MOST[key]:
        raise CheckpointError(f"{path}: {key} is {value!r:.80}, expected at most {_MOST[key]:g}")
    return float(value)


def _shards(directory: Path) -> list[Path]:
    shards = sorted(directory.glob("consolidated.*.pth"))
    expected = [f"consolidated.{i:02d}.pth" for i in range(len(shards))]
    if not shards:
        raise CheckpointError(f"{directory} lacks consolidated.00.pth")
    if [path.name for path in shards] != expected:
        missing = sorted(set(expected) - {path.name for path in shards})
        raise CheckpointError(
            f"{directory} lacks {missing[0]}; found {len(shards)} shards up to {shards[-1].name}"
        )
    return shards


def _joined_shape(slices: list[Tensor], axis: int | None) -> list[int]:
    """Shape of slices once they are joined along an axis; of the odd one out if they do not fit."""
    shape = list(slices[0].shape)
    for piece in slices[1:]:
        other = list(piece.shape)
        if axis is not None and len(other) == len(shape):
            shape[axis], other[axis] = shape[axis] + other[axis], shape[axis] + other[axis]
        if other != shape:
            return list(piece.shape)
    return shape


def _layer_index(name: str) -> int:
    match = re.match(r"layers\.(\d{1,5})\.", name)
    return int(match[1]) if match else -1


def _feed_forward_size(params: dict[str, Any], dim: int, path: Path) -> int:
    """Meta's rule: two thirds of four times the width, scaled, up to a multiple."""
    size = int(2 * (4 * dim) / 3)
    size = int(_number(params, "ffn_dim_multiplier", path, default=1.0) * size)
    has_multiple = params.get("multiple_of") is not None
    multiple = _integer(params, "multiple_of", path) if has_multiple else 256
    return multiple * -(-size // multiple)


def _rope(params: dict[str, Any], theta: float, dim: int, path: Path) -> dict[str, Any]:
    if not params.get("use_scaled_rope"):
        return {"rope_type": "default", "rope_theta": theta}
    # LLaMA 3.2 (1B, 3B: up to 3072 wide) stretches further than 3.1; params.json does not say
    factor = _number(params, "rope_scale_factor", path, default=32.0 if dim <= 3072 else 8.0)
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def _context_length(params: dict[str, Any], theta: float) -> int:
    if params.get("use_scaled_rope"):
        return 131072
    if theta > 10000.0:
        return 8192 if theta <= 500000.0 else 16384
    return 4096 if params.get("n_kv_heads") else 2048
