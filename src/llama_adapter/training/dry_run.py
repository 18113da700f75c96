"""What a recipe will train on, found out before it trains: `llama-adapter train RECIPE --check`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch

from llama_adapter.config import IGNORE_INDEX
from llama_adapter.data import (
    SOURCES,
    Component,
    InvalidRecord,
    Kind,
    Pieces,
    Sample,
    SampleEncoder,
    Source,
)
from llama_adapter.data.length_index import COLUMNS, measure_some
from llama_adapter.errors import DataError, LlamaAdapterError
from llama_adapter.processing.encoding import Encoded
from llama_adapter.processing.processor import LlamaAdapterProcessor
from llama_adapter.training.build import build
from llama_adapter.training.held_out import CaptionScorer
from llama_adapter.training.memory import Sizes, sizes_of
from llama_adapter.training.recipe import Recipe, SourceTypes
from llama_adapter.training.startup import check_positions, faults_of
from llama_adapter.training.streams import encoder_of, open_source, stream_of

READ = 200
"""Samples of each source that are read, images too."""
SMALL = 1 << 29
"""Bytes of frozen weights up to which checking reads them."""
ANSWER_MARKS = ("⟦", "⟧")
"""What surrounds answer tokens in the example."""
_MOST_PACKED = 20_000
"""Pieces that are laid into rows to see how full these become."""
_BAR = 40


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceReport:
    """What was found in one source."""

    name: str
    kind: Kind
    place: str
    """Its place in the recipe, `captions.sources.0`."""
    samples: int = 0
    """All of them."""
    held_out: int = 0
    read: int = 0
    pieces: int = 0
    """What the samples read were cut into."""
    tokens: dict[str, int] = field(default_factory=dict)
    """Least, median, 95th percentile, most and sum of the tokens of pieces."""
    answer_tokens: int = 0
    histogram: tuple[tuple[int, int], ...] = ()
    """Upper limits of token lengths, and how many pieces lie below each and above the last."""
    images: int = 0
    """Of the whole source, estimated; frames of videos count singly."""
    invalid: tuple[InvalidRecord, ...] = ()
    example: str = ""
    """A sample as the model reads it; answer tokens are between marks."""
    error: str | None = None
    """Why training cannot use it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KindReport:
    """What a step of one kind takes, estimated from the samples read."""

    samples_per_epoch: int
    rows_per_epoch: int
    epochs: float | None
    """How often the recipe's steps go through the data; None where their number is not known."""
    samples_per_step: float
    answer_tokens_per_step: float


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckReport:
    """What was found, and what it will need."""

    sources: tuple[SourceReport, ...]
    kinds: dict[Kind, KindReport]
    steps: int | None
    minutes: float | None
    sizes: Sizes | None
    feature_cache_bytes: int
    """What the features of all images take on disk, where the recipe caches them."""
    errors: tuple[str, ...]
    """Everything that would stop the run, one line each."""
    warnings: tuple[str, ...]

    def refuse(self) -> None:
        """DataError with all errors, if there are any."""
        if self.errors:
            raise DataError("; ".join(self.errors))

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        values = asdict(self)
        values["sizes"] = None if self.sizes is None else self.sizes.to_dict()
        return values

    def as_text(self) -> str:
        """The report for people; its errors are what `refuse` raises."""
        parts = [_source_text(source) for source in self.sources]
        parts.append(_plan_text(self))
        parts += [f"warning: {warning}" for warning in self.warnings]
        parts += [] if self.errors else ["nothing prevents training"]
        return "\n".join(parts)


def check_recipe(
    recipe: Recipe,
    processor: LlamaAdapterProcessor,
    *,
    types: SourceTypes = SOURCES,
    samples: int = READ,
    world: int = 1,
    score_captions: CaptionScorer | None = None,
) -> CheckReport:
    """Read some samples of each source, spread over it, and estimate steps and memory.

    A model that is small is built with its weights, as training would do it.

    Nothing is raised for bad data: the report holds every error.
    """
    sources: list[SourceReport] = []
    kinds: dict[Kind, KindReport] = {}
    errors: list[str] = []
    for kind, section in recipe.streams.items():
        encoder = encoder_of(section, recipe.data, processor)
        found = [
            _check_source(recipe, kind, number, encoder, types=types, samples=samples)
            for number in range(len(section.sources))
        ]
        sources += [report for report, _ in found]
        components = [component for _, component in found if component is not None]
        if len(components) == len(found) and all(len(c.pieces) for c in components):
            try:
                kinds[kind] = _estimate(
                    recipe, kind, [report for report, _ in found], components, encoder, world=world
                )
            except LlamaAdapterError as error:
                errors.append(str(error))
    errors = [*(f"{s.place}: {s.error}" for s in sources if s.error is not None), *errors]
    sizes = None
    try:
        sizes = sizes_of(recipe, world=world, processor=processor)
    except LlamaAdapterError as error:
        errors.append(str(error))
    faults = list(faults_of(recipe, processor, sizes, score_captions=score_captions))
    errors += map(str, faults)
    if sizes is not None and not faults:
        errors += _build_faults(recipe, sizes, sources)
    return CheckReport(
        sources=tuple(sources),
        kinds=kinds,
        steps=recipe.steps,
        minutes=recipe.minutes,
        sizes=sizes,
        feature_cache_bytes=(
            0 if sizes is None else sizes.feature_bytes * sum(s.images for s in sources)
        ),
        errors=tuple(errors),
        warnings=tuple(_warnings(recipe, processor, sources, kinds, sizes)),
    )


def _build_faults(recipe: Recipe, sizes: Sizes, sources: list[SourceReport]) -> Iterator[str]:
    try:
        for source in sources:
            check_positions(sizes, source.tokens.get("most", 0), name=source.place)
        if sizes.frozen_bytes <= SMALL and recipe.base.quantization == "none":
            build(recipe, device=torch.device("cpu"))
    except LlamaAdapterError as error:
        yield str(error)


def _check_source(
    recipe: Recipe,
    kind: Kind,
    number: int,
    encoder: SampleEncoder,
    *,
    types: SourceTypes,
    samples: int,
) -> tuple[SourceReport, Component | None]:
    """What was found in a source, and the pieces of the samples that were read."""
    described = recipe.streams[kind].sources[number]
    place = f"{kind}s.sources.{number}"
    try:
        source, held_out = open_source(described, kind, types=types)
    except LlamaAdapterError as error:
        return SourceReport(name=described.type, kind=kind, place=place, error=str(error)), None
    count = min(samples, len(source))
    indices = np.unique(np.linspace(0, len(source) - 1, count).astype(int)).tolist()
    pieces, images, example = _read(source, encoder, indices)
    refusal = None
    try:
        pieces.refuse_beyond(recipe.most_invalid(described), name=source.name)
    except DataError as error:
        refusal = str(error)
    groups = source.groups()
    distinct = len(source) if groups is None else len(np.unique(groups))
    report = SourceReport(
        name=source.name,
        kind=kind,
        place=place,
        samples=len(source),
        held_out=len(held_out),
        read=len(indices),
        pieces=len(pieces),
        tokens=_summary(pieces.column("tokens")),
        answer_tokens=int(pieces.column("answer_tokens").sum()),
        histogram=_histogram(pieces.column("tokens")),
        images=round(images / len(indices) * distinct),
        invalid=pieces.invalid,
        example=example,
        error=refusal,
    )
    return report, Component(source=source, pieces=pieces, weight=described.weight)


def _read(source: Source, encoder: SampleEncoder, indices: list[int]) -> tuple[Pieces, int, str]:
    """The pieces of samples whose images can be read too, the number of images, and an example."""
    pieces = measure_some(source, encoder, indices)
    invalid = list(pieces.invalid)
    unreadable: list[int] = []
    images, example = 0, ""
    _, firsts = np.unique(pieces.column("sample"), return_index=True)
    for index, first, stop in pieces.table[firsts, :3].tolist():
        try:
            sample = source[index]
            # images are decoded here, and placeholders counted
            encoded = encoder.encode_sample(sample, first, stop)
        except LlamaAdapterError as error:
            invalid.append(InvalidRecord(where=source.where(index), reason=str(error)))
            unreadable.append(index)
            continue
        if encoded.pixels is not None:
            images += encoded.pixels.shape[:-3].numel()
        example = example or _example(sample, encoded.encoded, encoder.processor)
    table = pieces.table[~np.isin(pieces.column("sample"), unreadable)]
    return replace(pieces, table=table, invalid=tuple(invalid)), images, example


def _summary(values: np.ndarray) -> dict[str, int]:
    if not len(values):
        return {}
    return {
        "least": int(values.min()),
        "median": int(np.median(values)),
        "p95": int(np.percentile(values, 95)),
        "most": int(values.max()),
        "sum": int(values.sum()),
    }


def _histogram(lengths: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Counts by powers of two, from the first that holds any."""
    if not len(lengths):
        return ()
    limits = [2**n for n in range(3, 18)]
    counts = np.histogram(lengths, bins=[0, *limits])[0].tolist()
    pairs = list(zip(limits, counts, strict=True))
    used = [index for index, (_, count) in enumerate(pairs) if count]
    return tuple(pairs[used[0] : used[-1] + 1])


def _example(sample: Sample, encoded: Encoded, processor: LlamaAdapterProcessor) -> str:
    """The sample's text as decoded from its tokens; those that are scored between marks."""
    text = f"{sample.id}\n"
    run: list[int] = []
    scored = False
    for token, label in zip((*encoded.input_ids, -1), (*encoded.labels, None), strict=True):
        if run and (label is None or (label != IGNORE_INDEX) != scored):
            decoded = processor.tokenizer.decode(run, clean_up_tokenization_spaces=False)
            text += decoded.join(ANSWER_MARKS) if scored else decoded
            run = []
        scored = label is not None and label != IGNORE_INDEX
        run.append(token)
    return text


def _estimate(
    recipe: Recipe,
    kind: Kind,
    reports: list[SourceReport],
    components: list[Component],
    encoder: SampleEncoder,
    *,
    world: int,
) -> KindReport:
    section = recipe.streams[kind]
    shares = [(source.samples - source.held_out) / source.read for source in reports]
    weighted = [c.weight * share for c, share in zip(components, shares, strict=True)]
    pieces, answers, samples = (
        sum(w * count for w, count in zip(weighted, counts, strict=True))
        for counts in zip(
            *((s.pieces, s.answer_tokens, s.read - len(s.invalid)) for s in reports), strict=True
        )
    )
    # an epoch as it would be if all pieces were like those that were read
    scale = min(1.0, _MOST_PACKED / pieces)
    rng = np.random.default_rng(recipe.seed)
    epoch = []
    for component, share in zip(components, shares, strict=True):
        count = max(1, round(scale * share * len(component.pieces)))
        table = np.resize(rng.permutation(component.pieces.table), (count, len(COLUMNS)))
        epoch.append(replace(component, pieces=replace(component.pieces, table=table)))
    stream = stream_of(kind, epoch, encoder, section, recipe.data, seed=recipe.seed, world=world)
    rows = max(1, round(stream.rows_in_epoch() / scale))
    # until the last kind sets in, each that has comes in every step
    last = max(other.start for other in recipe.streams.values())
    rows_per_step = section.rows * section.accumulation
    every = section.every if len(recipe.streams) > 1 else 1
    share = (1 - last) / every + last - section.start
    steps = None if recipe.steps is None else recipe.steps * share
    return KindReport(
        samples_per_epoch=round(samples),
        rows_per_epoch=rows,
        epochs=None if steps is None else round(steps * rows_per_step / rows, 3),
        samples_per_step=round(samples * rows_per_step / rows, 1),
        answer_tokens_per_step=round(answers * rows_per_step / rows, 1),
    )


_MANY_EPOCHS = 30
"""More often captions and instructions are gone through for no good; ours to choose."""


def _warnings(
    recipe: Recipe,
    processor: LlamaAdapterProcessor,
    sources: list[SourceReport],
    kinds: dict[Kind, KindReport],
    sizes: Sizes | None,
) -> list[str]:
    found = []
    is_chosen = recipe.adapter.start is None  # else the template is the one it was trained with
    if (
        is_chosen
        and recipe.prompt.template == "alpaca"
        and getattr(processor.tokenizer, "chat_template", None)
    ):
        found.append(
            "prompt.template is 'alpaca', but the base's tokenizer has a chat template: a base "
            "that was tuned to follow it is better asked with 'chat'"
        )
    context = None if sizes is None else sizes.context
    for source in sources:
        longest = source.tokens.get("most", 0)
        if context is not None and longest > context:
            found.append(
                f"{source.place}: a sample has {longest} tokens, the base knows {context} "
                f"positions; set {source.kind}s.row_length to {context} at most"
            )
    for kind, report in kinds.items():
        if report.epochs is not None and report.epochs < 1:
            found.append(
                f"{kind}s: {recipe.steps} steps go through {report.epochs:.1%} of the data only"
            )
        if report.epochs is not None and report.epochs > _MANY_EPOCHS:
            found.append(
                f"{kind}s: {recipe.steps} steps go {report.epochs:.0f} times through the data "
                "and learn it by heart; lower steps, or give more data"
            )
    for source in sources:
        if source.held_out > source.samples / 2:
            found.append(
                f"{source.place}: {source.held_out} of {source.samples} samples are held out; set "
                "held_out lower to learn from more of them"
            )
    return found


def _source_text(source: SourceReport) -> str:
    lines = [f"{source.place}: {source.name}"]
    if source.read:
        lines.append(
            f"  {source.samples:,} samples, {source.held_out:,} held out; read {source.read:,}, "
            f"invalid {len(source.invalid):,}"
        )
        if source.pieces != source.read - len(source.invalid):
            lines[-1] += f", cut into {source.pieces:,} pieces"
    if source.tokens:
        t = source.tokens
        share = source.answer_tokens / t["sum"]
        lines.append(
            f"  tokens: least {t['least']}, median {t['median']}, 95% below {t['p95']}, "
            f"most {t['most']}; {share:.0%} of them answers"
        )
        most = max(count for _, count in source.histogram)
        for limit, count in source.histogram:
            lines.append(f"  {f'< {limit}':>9} {'#' * round(_BAR * count / most):<{_BAR}} {count}")
    lines += [f"  invalid: {invalid}" for invalid in source.invalid[:10]]
    if len(source.invalid) > 10:
        lines.append(f"  invalid: and {len(source.invalid) - 10} more")
    if source.example:
        opening, closing = ANSWER_MARKS
        lines.append(f"  example, answer tokens between {opening} and {closing}:")
        lines += [f"  | {line}" for line in source.example.splitlines()]
    return "\n".join(lines)


def _plan_text(report: CheckReport) -> str:
    known = [] if report.steps is None else [f"{report.steps:,} steps"]
    known += [] if report.minutes is None else [f"{report.minutes:g} minutes"]
    lines = [f"plan: {' or '.join(known)}"]
    for kind, each in report.kinds.items():
        lines.append(
            f"  {kind}s: about {each.rows_per_epoch:,} rows an epoch, {_epochs(each)}; "
            f"a step takes about {each.samples_per_step:,.0f} samples "
            f"with {each.answer_tokens_per_step:,.0f} answer tokens"
        )
    sizes = report.sizes
    if sizes is not None:
        trained = sum(sizes.trained_parameters.values())
        groups = ", ".join(f"{name} {n:,}" for name, n in sizes.trained_parameters.items())
        lines.append(
            f"  base {sizes.base_parameters:,} parameters in {sizes.layers} layers, "
            f"vision encoder {sizes.vision_parameters:,}; trained {trained:,} ({groups})"
        )
        lines.append(
            f"  memory of one process, estimated before sharding: {_gib(sizes.total_bytes)} "
            f"(frozen {_gib(sizes.frozen_bytes)}, trained with optimizer "
            f"{_gib(sizes.trained_bytes)}, activations {_gib(sizes.activation_bytes)}, "
            f"logits at most {_gib(sizes.logit_bytes)})"
        )
    if report.feature_cache_bytes:
        images = sum(source.images for source in report.sources)
        lines.append(
            f"  disk for the features of at most about {images:,} images: "
            f"{_gib(report.feature_cache_bytes)}"
        )
    return "\n".join(lines)


def _epochs(report: KindReport) -> str:
    return "epochs by the pace" if report.epochs is None else f"{report.epochs:.2f} epochs"


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.1f} MiB"
