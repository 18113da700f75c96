"""Experts by name: ours in a table, other packages' by an entry point, options in one string.

    caption=DIR         a caption adapter for the same base; a model of another kind by its name
    ocr                 words in the image
    detection=MODEL     objects in the image
    search=FOLDER       passages of the user's own texts
    web=URL             results of a search service that the user names
    auto                whichever of the others a question and its image call for

Options follow after commas: `ocr,confidence=0.6`; a comma that belongs to a value is doubled.
A package adds experts in the entry-point group `llama_adapter.experts`: each entry point names a
subclass of `ExpertOptions`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import Any

from llama_adapter.errors import ExpertError, MissingDependencyError
from llama_adapter.experts.auto import AUTO, AutoRouter
from llama_adapter.experts.base import Expert
from llama_adapter.experts.caption import CaptionOptions
from llama_adapter.experts.detection import DetectionOptions
from llama_adapter.experts.ocr import OcrOptions
from llama_adapter.experts.options import ExpertContext, ExpertOptions
from llama_adapter.experts.pool import ExpertPool
from llama_adapter.experts.search import SearchOptions
from llama_adapter.experts.web_search import WebOptions

GROUP = "llama_adapter.experts"
"""The entry-point group by which other packages add experts."""
EXPERTS: Mapping[str, type[ExpertOptions]] = {
    kind.name: kind
    for kind in (CaptionOptions, OcrOptions, DetectionOptions, SearchOptions, WebOptions)
}
"""Those of this package, by name; `auto` is not an expert but chooses among them."""

Defaults = Mapping[str, Mapping[str, Any]]


def kinds() -> dict[str, type[ExpertOptions]]:
    """Every kind of expert by name; ours cannot be replaced by another package's."""
    found: dict[str, type[ExpertOptions]] = {}
    for point in entry_points(group=GROUP):
        try:
            kind = point.load()
        except (ImportError, AttributeError) as error:
            raise ExpertError(
                f"entry point {point.name!r} in {GROUP} cannot be loaded: {error}"
            ) from error
        if not (isinstance(kind, type) and issubclass(kind, ExpertOptions)):
            raise ExpertError(
                f"entry point {point.name!r} in {GROUP} must name a subclass of ExpertOptions, "
                f"got {kind!r}"[:300]
            )
        found[point.name] = kind
    return {**found, **EXPERTS}


def read_options(texts: Sequence[str], defaults: Defaults | None = None) -> list[ExpertOptions]:
    """The options of experts such as `ocr,confidence=0.6`; `auto` has none and is passed over.

    Refuses unknown experts and options, wrong values and missing packages; loads nothing.
    """
    table = kinds()
    read: list[ExpertOptions] = []
    seen: set[str] = set()
    for text in texts:
        name, value, rest = _parse(text)
        if name not in table and name != AUTO:
            known = ", ".join(sorted([*table, AUTO]))
            raise ExpertError(f"unknown expert {name[:80]!r}; known: {known}")
        if name in seen and name != SearchOptions.name:
            raise ExpertError(f"expert {name!r} is named twice")
        seen.add(name)
        if name == AUTO:
            if rest or value is not None:
                raise ExpertError(f"expert 'auto' takes no options, got {text[:200]!r}")
            continue
        kind = table[name]
        for package, extra in kind.needs:
            if find_spec(package) is None:
                raise MissingDependencyError(package, extra=extra, purpose=f"the expert {name!r}")
        if value is not None:
            if kind.main is None:
                raise ExpertError(f"expert {name!r}: unknown value {value[:80]!r}")
            rest[kind.main] = value
        # they go together: the bundled captioner's instruction is none of another one's
        given = {} if kind.main in rest else (defaults or {}).get(name, {})
        read.append(kind(**{**given, **rest}))
    return read


def _parse(text: str) -> tuple[str, str | None, dict[str, Any]]:
    """Name, main value and options.

    >>> _parse("ocr,confidence=0.6")
    ('ocr', None, {'confidence': '0.6'})
    >>> _parse("search=my,,notes,passages=5")
    ('search', 'my,notes', {'passages': '5'})
    """
    first, *parts = [part.replace(",,", ",") for part in re.split(r"(?<!,),(?!,)", text)]
    name, separator, value = first.partition("=")
    options: dict[str, Any] = {}
    for part in parts:
        key, equals, rest = part.partition("=")
        if not equals:
            raise ExpertError(f"expert {text[:200]!r}: {part[:80]!r} must be OPTION=VALUE")
        options[key.strip()] = rest.strip()
    return name.strip(), value if separator else None, options


def _has_auto(texts: Sequence[str]) -> bool:
    return any(_parse(text)[0] == AUTO for text in texts)


def make_experts(texts: Sequence[str], context: ExpertContext | None = None) -> list[Expert]:
    """The experts that texts such as `ocr,confidence=0.6` name; `make_pool` takes `auto`, too."""
    context = context or ExpertContext()
    named = read_options(texts, context.defaults)
    if _has_auto(texts):
        raise ExpertError("expert 'auto' chooses among others: use make_pool")
    return [options.open(context) for options in named]


def make_pool(
    texts: Sequence[str], context: ExpertContext | None = None, **limits: Any
) -> ExpertPool:
    """A pool of the experts that texts name, with the limits of `ExpertPool`.

    With `auto` among them the others are candidates, and so are those of ours that need nothing
    named.
    """
    context = context or ExpertContext()
    if not _has_auto(texts):
        return ExpertPool(make_experts(texts, context), **limits)
    named = read_options(texts, context.defaults)
    candidates: list[ExpertOptions] = []
    missing: dict[str, str] = {}
    for name, kind in kinds().items():
        own = [options for options in named if isinstance(options, kind)]
        defaults = context.defaults.get(name, {})
        if own:
            candidates += own
        elif any(find_spec(package) is None for package, _ in kind.needs):
            missing[name] = f"pip install 'llama-adapter[{kind.needs[0][1]}]' adds it"
        elif kind.main is not None and not defaults.get(kind.main):
            missing[name] = f"it {kind.wants()}"
        else:
            candidates.append(kind(**defaults))
    makers = [(options.name, partial(options.open, context)) for options in candidates]
    return ExpertPool(router=AutoRouter(makers, missing=missing), **limits)
