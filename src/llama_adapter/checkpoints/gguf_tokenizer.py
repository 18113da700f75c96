"""A tokenizer as the fields of a GGUF file from which llama.cpp builds its own."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llama_adapter.errors import CheckpointError
from llama_adapter.processing.processor import LlamaAdapterProcessor

SPACE = "▁"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|"
_MARKS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_SPLITS = {
    f"{_CONTRACTIONS}{_WORDS}\\p{{N}}{{1,3}}{_MARKS}": "llama-bpe",
    f"{_CONTRACTIONS}{_WORDS}\\p{{N}}{_MARKS}": "qwen2",
}
"""llama.cpp's names of the patterns by which byte-level tokenizers split texts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Vocabulary:
    """Tokens, how texts are split into them, and which ones end an answer."""

    model: str
    """`llama`: merges by score, with bytes as tokens; `gpt2`: merges by rank, of bytes."""
    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...]
    merges: tuple[str, ...]
    special: Mapping[str, int]
    """Ids by gguf's names: bos, eos, eot, unk, pad."""
    add_bos: bool
    add_space_prefix: bool

    @classmethod
    def of(cls, processor: LlamaAdapterProcessor, *, size: int) -> Vocabulary:
        """Of a processor, filled up to the `size` of a base's embeddings.

        Raises CheckpointError for a tokenizer that llama.cpp does not compute.
        """
        tokenizer = processor.tokenizer
        described = json.loads(tokenizer.backend_tokenizer.to_str())
        model = described["model"]
        if model["type"] != "BPE":
            raise _refusal(f"it is of type {model['type']}, not BPE")
        has_bytes = bool(model.get("byte_fallback"))
        split = _split(described, has_bytes=has_bytes)
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        tokens, types = _tokens(described, size=size, unknown=tokenizer.unk_token_id)
        first: dict[str, int] = {}
        for rank, (left, right) in enumerate(pairs):
            first.setdefault(left + right, rank)
        end = processor.stop_options.get("eos_token_id")
        ends = [end] if isinstance(end, int) else list(end or ())
        special = {
            "bos": tokenizer.bos_token_id,
            "eos": tokenizer.eos_token_id,
            "eot": next((i for i in ends if i != tokenizer.eos_token_id), None),
            "unk": tokenizer.unk_token_id,
            "pad": tokenizer.pad_token_id,
        }
        return cls(
            model="llama" if has_bytes else "gpt2",
            pre="default" if has_bytes else split,
            tokens=tokens,
            types=types,
            scores=tuple(-float(first.get(token, len(pairs))) for token in tokens),
            merges=() if has_bytes else tuple(" ".join(pair) for pair in pairs),
            special={name: i for name, i in special.items() if i is not None},
            add_bos=tokenizer("").input_ids[:1] == [tokenizer.bos_token_id],
            add_space_prefix=split == SPACE,
        )

    def write(self, writer: Any) -> None:
        """Add it to a file of gguf's GGUFWriter."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.model == "llama":
            writer.add_token_scores(self.scores)
            writer.add_add_space_prefix(self.add_space_prefix)
        else:
            writer.add_token_merges(self.merges)
        for name, token in self.special.items():
            getattr(writer, f"add_{name}_token_id")(token)
        writer.add_add_bos_token(self.add_bos)


def _refusal(reason: str) -> CheckpointError:
    return CheckpointError(f"the adapter's tokenizer cannot be written for llama.cpp: {reason}")


def _split(described: Mapping[str, Any], *, has_bytes: bool) -> str:
    """What precedes merges: `▁` or nothing put in front, with bytes as tokens; else a name."""
    normalizers = _steps(described["normalizer"], "normalizers")
    steps = _steps(described["pre_tokenizer"], "pretokenizers")
    kinds = [step["type"] for step in (*normalizers, *steps)]
    if has_bytes:
        if kinds == ["Metaspace"] and steps[0]["replacement"] == SPACE and not steps[0]["split"]:
            return "" if steps[0]["prepend_scheme"] == "never" else SPACE
        spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
        prefix = {"type": "Prepend", "prepend": SPACE}
        if not steps and normalizers in ([prefix, spaces], [spaces]):
            return SPACE if prefix in normalizers else ""
    elif kinds == ["ByteLevel"] and steps[0]["use_regex"] and not steps[0]["add_prefix_space"]:
        return "gpt-2"
    elif kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]:
        if steps[1]["use_regex"] and not steps[1]["add_prefix_space"]:
            return "smollm"
    elif kinds in (["Split", "ByteLevel"], ["NFC", "Split", "ByteLevel"]):
        pattern, last = steps[0]["pattern"].get("Regex"), steps[1]
        if pattern in _SPLITS and not last["use_regex"] and not last["add_prefix_space"]:
            return _SPLITS[pattern]
    raise _refusal(f"it prepares texts by {', '.join(kinds) or 'nothing'}, in a way of its own")


def _steps(described: Mapping[str, Any] | None, inner: str) -> Sequence[Mapping[str, Any]]:
    if described is None:
        return []
    return described[inner] if described["type"] == "Sequence" else [described]


def _tokens(
    described: Mapping[str, Any], *, size: int, unknown: int | None
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Text and type of each id; ids without a token are unused."""
    from gguf import TokenType

    model = described["model"]
    vocabulary: dict[str, int] = model["vocab"]
    beyond = [t["content"] for t in described["added_tokens"] if t["id"] >= size]
    if beyond or max(vocabulary.values(), default=0) >= size:
        raise _refusal(f"it has tokens beyond the model's {size}, such as {(beyond or ['?'])[0]!r}")
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [TokenType.UNUSED] * size
    for token, i in vocabulary.items():
        tokens[i], types[i] = token, TokenType.NORMAL
        if model.get("byte_fallback") and re.fullmatch("<0x[0-9A-F]{2}>", token):
            types[i] = TokenType.BYTE
    for added in described["added_tokens"]:
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        tokens[added["id"]], types[added["id"]] = added["content"], kind
    if unknown is not None:
        types[unknown] = TokenType.UNKNOWN
    return tuple(tokens), tuple(int(kind) for kind in types)
