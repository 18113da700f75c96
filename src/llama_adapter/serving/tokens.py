"""The bytes of a single token, whatever kind of tokenizer it comes from."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_letters() -> dict[str, int]:
    """The letters that byte-level tokenizers write bytes as (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(256 + i): byte for i, byte in enumerate(others)}


_LETTERS = _byte_letters()


@lru_cache(maxsize=64)
def _is_byte_level(tokenizer: Any) -> bool:
    return "ByteLevel" in str(tokenizer.backend_tokenizer.decoder)


def token_bytes(tokenizer: Any, token: int) -> bytes:
    """What the token adds to a text, as UTF-8; a part of a letter for some."""
    text = tokenizer.convert_ids_to_tokens(token)
    if text is None or token in tokenizer.added_tokens_decoder:
        return (text or "").encode()
    if _is_byte_level(tokenizer) and all(letter in _LETTERS for letter in text):
        return bytes(_LETTERS[letter] for letter in text)
    if found := _BYTE.fullmatch(text):
        return bytes.fromhex(found[1])
    return str(text).replace("▁", " ").encode()
