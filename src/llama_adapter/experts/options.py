"""What a user may say about an expert: one pydantic model for each kind."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from llama_adapter.config import did_you_mean, fault_text
from llama_adapter.errors import ExpertError
from llama_adapter.experts.base import Expert


def _split(value: Any) -> Any:
    return [w.strip() for w in value.split("+") if w.strip()] if isinstance(value, str) else value


Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Words = Annotated[tuple[str, ...], BeforeValidator(_split)]
"""Several words; separated by `+` where a user writes them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertContext:
    """What experts may use of the model that will answer; all of it may be missing."""

    model: Any = None
    """A `LlamaAdapterForConditionalGeneration`."""
    device: str | None = None
    """Where an expert's own model runs."""
    defaults: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Options by expert where the user gives none, such as the caption adapter of a base."""
    caption_expert: Callable[[Path, Any], Expert] | None = None
    """Makes the expert of a caption adapter's directory and its options, where an engine runs the
    model; None: the expert runs `model` itself."""


class ExpertOptions(BaseModel):
    """Options of one kind of expert; ExpertError says what is wrong with them."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: ClassVar[str]
    """What users call it."""
    main: ClassVar[str | None] = None
    """The option that follows `NAME=`; its description says in messages what is expected."""
    needs: ClassVar[tuple[tuple[str, str], ...]] = ()
    """Packages that must be importable, each with the extra of ours that installs it."""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ExpertError(f"expert {self.name!r}{self._explain(error)}") from error

    @abstractmethod
    def open(self, context: ExpertContext) -> Expert:
        """The expert. Raises ExpertError where its model or files cannot be used."""

    @classmethod
    def wants(cls) -> str:
        """As `needs a folder of texts: --expert search=FOLDER`; nothing without a main option."""
        if cls.main is None:
            return ""
        main = cls.model_fields[cls.main]
        return f"needs {main.description}: --expert {cls.name}={main.title or cls.main.upper()}"

    @classmethod
    def _explain(cls, error: ValidationError) -> str:
        """The first fault, unknown options first: what is missing may be what they mean."""
        fault = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        option = str(fault["loc"][0]) if fault["loc"] else ""
        if (option == cls.main and fault["input"] == "") or fault["type"] == "missing":
            return f" {cls.wants()}"
        if fault["type"] == "extra_forbidden":
            known = [key for key in cls.model_fields if key != cls.main]
            hint = did_you_mean(option, known)
            return f": unknown option {option[:80]!r}{hint} (options: {', '.join(known)})"
        return f": {option}: {fault_text(fault)}"
