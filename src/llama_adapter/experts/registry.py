"""Experts by name: ours in a table, other packages' by an entry point, options in one string.

    caption=DIR         a caption adapter for the same base; a model of another kind by its name
    ocr                 words in the picture
    detection=MODEL     things in the picture
    search=FOLDER       passages of the user's own texts
    web=URL             results of a search service that the user names
    auto                whichever of the others a question and its picture call for

Options follow after commas: `ocr,confidence=0.6`; a comma that belongs to a value is doubled.
A package adds experts in the entry-point group `llama_adapter.experts`: each entry point names an
`ExpertKind`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from llama_adapter.errors import ExpertError, MissingDependencyError

if TYPE_CHECKING:
    from llama_adapter.experts.base import Expert

AUTO = "auto"
GROUP = "llama_adapter.experts"
"""The entry-point group by which other packages add experts."""

MAX_NUMBER = 1_000_000
"""Numbers beyond, on either side of 0, are refused as options."""

T = TypeVar("T", bool, int, float, str)
_TRUE = {"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False}


@dataclass(frozen=True, kw_only=True, slots=True)
class Surroundings:
    """What experts may use of the model that will answer; all of it may be missing."""

    model: Any = None
    """A `LlamaAdapterForConditionalGeneration`."""
    processor: Any = None
    """Its `LlamaAdapterProcessor`."""
    device: str | None = None
    """Where an expert's own model runs."""
    defaults: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Options by expert where the user gives none, such as the caption adapter of a base."""


@dataclass(slots=True)
class Options:
    """One expert's options as the user wrote them; each is taken once, the rest are refused."""

    text: str
    """All of it, for messages."""
    values: dict[str, str]
    """By name; the first, unnamed one is called `main`."""
    known: list[str] = field(default_factory=list)

    def take(self, name: str, default: T) -> T:
        """An option's value, of the type of its default."""
        self.known.append(name)
        text = self.values.pop(name, None)
        if text is None:
            return default
        kind = type(default)
        try:
            value = _TRUE[text.lower()] if kind is bool else kind(text)
            # NaN is in no range
            if isinstance(value, int | float) and not abs(value) <= MAX_NUMBER:
                raise ValueError(value)
        except (ValueError, KeyError) as error:
            raise ExpertError(
                f"expert {self.text[:200]!r}: {name} must be {_names[kind]}, got {text[:80]!r}"
            ) from error
        return value

    def words(self, name: str) -> tuple[str, ...]:
        """An option of several words, parted by `+`."""
        return tuple(w.strip() for w in self.take(name, "").split("+") if w.strip())

    def done(self) -> None:
        """Refuse what nobody took."""
        for name in self.values:
            close = difflib.get_close_matches(name, self.known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            known = ", ".join(n for n in self.known if n != "main") or "none"
            what = "value" if name == "main" else f"option {name!r}"
            raise ExpertError(f"expert {self.text!r}: unknown {what}{hint} (options: {known})")


_names: dict[type, str] = {bool: "yes or no", int: "a whole number", float: "a number"}


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertKind:
    """How an expert is made, and what it needs."""

    make: Callable[[Options, Surroundings], Expert]
    summary: str
    needs: tuple[tuple[str, str], ...] = ()
    """Packages that must be importable, each with the extra of ours that installs it."""
    wants: str | None = None
    """What must follow `=`, for messages; None where nothing must."""


def parse(text: str) -> tuple[str, Options]:
    """A name and its options.

    >>> parse("ocr,confidence=0.6")[1].values
    {'confidence': '0.6'}
    >>> parse("search=my,,notes,passages=5")[1].values
    {'main': 'my,notes', 'passages': '5'}
    """
    parts = [part.replace(",,", ",") for part in re.split(r"(?<!,),(?!,)", text)]
    name, separator, value = parts[0].partition("=")
    values = {"main": value} if separator else {}
    for part in parts[1:]:
        key, separator, value = part.partition("=")
        if not separator:
            raise ExpertError(f"expert {text!r}: {part!r} must be OPTION=VALUE")
        values[key.strip()] = value.strip()
    return name.strip(), Options(text, values)


def kinds() -> dict[str, ExpertKind]:
    """Every kind of expert by name; ours cannot be replaced by another package's."""
    from llama_adapter.experts.table import EXPERTS

    found: dict[str, ExpertKind] = {}
    for point in entry_points(group=GROUP):
        try:
            kind = point.load()
        except (ImportError, AttributeError) as error:
            raise ExpertError(
                f"entry point {point.name!r} in {GROUP} cannot be loaded: {error}"
            ) from error
        if not isinstance(kind, ExpertKind):
            raise ExpertError(
                f"entry point {point.name!r} in {GROUP} must name an ExpertKind, "
                f"got {type(kind).__name__}"
            )
        found[point.name] = kind
    return {**found, **EXPERTS}


def check(texts: Sequence[str]) -> None:
    """Refuse an unknown expert, a missing value or package, before anything is loaded."""
    table = kinds()
    seen: set[str] = set()
    for text in texts:
        name, options = parse(text)
        if name not in table:
            known = ", ".join(sorted(table))
            raise ExpertError(f"unknown expert {name!r}; known: {known}")
        if name in seen and name != "search":
            raise ExpertError(f"expert {name!r} is named twice")
        seen.add(name)
        kind = table[name]
        for package, extra in kind.needs:
            if find_spec(package) is None:
                raise MissingDependencyError(package, extra=extra, purpose=f"the expert {name!r}")
        if kind.wants and not options.values.get("main"):
            raise ExpertError(f"expert {name!r} needs {kind.wants}: --expert {name}=…")


def make_experts(texts: Sequence[str], surroundings: Surroundings | None = None) -> list[Expert]:
    """The experts that texts such as `ocr,confidence=0.6` name.

    With `auto` among them, the others are those it chooses from.
    """
    check(texts)
    around = surroundings or Surroundings()
    if any(parse(text)[0] == AUTO for text in texts):
        return [_automatic([text for text in texts if parse(text)[0] != AUTO], around)]
    return [make(text, around) for text in texts]


def _automatic(texts: Sequence[str], around: Surroundings) -> Expert:
    """The chooser among the named experts, and those of ours that need nothing named."""
    from llama_adapter.experts.automatic import AutomaticExpert

    named = {parse(text)[0]: text for text in texts}
    missing: dict[str, str] = {}
    for name, kind in kinds().items():
        if name in named or name == AUTO:
            continue
        lacking = [package for package, _ in kind.needs if find_spec(package) is None]
        if lacking:
            missing[name] = f"pip install 'llama-adapter[{kind.needs[0][1]}]' adds it"
        elif kind.wants:
            missing[name] = f"it needs {kind.wants}: --expert {name}=…"
        elif name == "caption" and not around.defaults.get(name):
            missing[name] = "it needs a caption adapter: --expert caption=DIR"
        else:
            named[name] = name
    order = [name for name in kinds() if name in named]
    makers = {name: partial(make, named[name], around) for name in order}
    return AutomaticExpert(makers, missing=missing)


def make(text: str, surroundings: Surroundings) -> Expert:
    """One expert, from its text and the defaults around it."""
    name, options = parse(text)
    for key, value in surroundings.defaults.get(name, {}).items():
        options.values.setdefault(key, value)
    expert = kinds()[name].make(options, surroundings)
    options.done()
    return expert


def existing_folder(text: str, *, expert: str) -> Path:
    """The folder of that path; ExpertError where there is none."""
    path = Path(text).expanduser()
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise ExpertError(f"expert {expert!r}: folder {text!r} {what}")
    return path
