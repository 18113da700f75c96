"""What is learned from: samples, the sources that hold them, and records that hold none.

A source opens its files by itself, in whichever process it is used, and keeps little more in
memory than where each record starts. Nothing here reads an image: a sample refers to it.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from pydantic import BaseModel, ConfigDict

from llama_adapter.conversation import Conversation
from llama_adapter.errors import DataError

Kind = Literal["caption", "instruction"]
"""Which loss a sample feeds: the VISION group's or the LANGUAGE group's (V2 §4.2)."""

KINDS: tuple[Kind, ...] = ("caption", "instruction")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One conversation to learn from; every assistant turn is scored."""

    id: str
    """Names file and line, such as `alpaca.json:17`."""
    kind: Kind
    conversation: Conversation
    branches: tuple[Conversation, ...] = ()
    """Further ways to go on behind the same image: each is learned as if it were alone, and the
    tokens with which all begin are computed once."""

    def __post_init__(self) -> None:
        if self.kind == "caption" and not self.conversation.images:
            raise DataError(f"{self.id}: a caption needs an image, found none")


def placed(error: Exception, where: str) -> DataError:
    """The same refusal, with file and line in front once."""
    message = str(error)
    return DataError(message if message.startswith(where) else f"{where}: {message}")


class Source(Protocol):
    """Samples by number. `DataError` from an item says which record is invalid, and why."""

    @property
    def name(self) -> str:
        """What reports call it: its type and file."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...

    def where(self, index: int) -> str:
        """File and line of a sample, also where it is invalid."""

    def groups(self) -> np.ndarray | None:
        """For each sample a number that samples about one image share; None: all differ."""

    def fingerprint(self) -> str:
        """Changes when what the source holds changes."""


@runtime_checkable
class DrawsOnOthers(Protocol):
    """What a source adds whose samples hold a part of others, such as the text of another image."""

    def keep_apart(self, held_out: np.ndarray, /) -> None:
        """Draw no longer on these samples for others: nothing is learned of what is held out."""


class SourceOptions(BaseModel):
    """What a recipe says about one source; a subclass for each `type`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @abstractmethod
    def open(self, kind: Kind) -> Source:
        """The source. Raises DataError for missing, empty or unreadable files."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InvalidRecord:
    """A record that cannot be learned from."""

    where: str
    """Source file and line."""
    reason: str

    def __str__(self) -> str:
        return self.reason if self.reason.startswith(self.where) else f"{self.where}: {self.reason}"

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return {"where": self.where, "reason": self.reason}
