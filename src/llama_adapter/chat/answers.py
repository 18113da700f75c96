"""What a session gives back; without torch, for a session with a server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llama_adapter.experts.base import Report


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatAnswer:
    """What came back for one question."""

    text: str
    tokens: int
    """New tokens, the end of turn included."""
    seconds: float
    """From the question to the last token, experts included."""
    contexts: tuple[Report, ...]
    """What each expert reported, as the model read it; those that failed say why."""
    notes: tuple[str, ...] = ()
    """What to know about the images it rests on, such as a video that is damaged."""
