"""Recipes: everything that decides a training run, as one strict YAML file.

An unknown or misspelled key is an error with a suggestion. Values may be changed from outside by
`key.path=value`, lists by number: `instructions.sources.0.path=mine.json`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from llama_adapter.config import AdapterConfig, did_you_mean, fault_text, from_version_1
from llama_adapter.data import SOURCES, Kind, SourceOptions
from llama_adapter.errors import ConfigError
from llama_adapter.files import parse_yaml, read_yaml

SourceTypes = Mapping[str, type[SourceOptions]]

CACHE = "cache"
"""The folder of a run directory for lengths of samples and features of images."""
MOST_STEPS = 10**9
MOST_MINUTES = 10**6
MOST_ROWS = 2**17
"""Of a micro-batch over all processes, and micro-batches of a step."""
MOST_TOKENS = 2**22
"""Of a row, and of a generated caption."""
MOST_WORKERS = 512
MOST_RANK = 2**15
MOST_WEIGHT = 10_000
_MOST_DEPTH = 32
_MOST_FAULTS = 8
_LARGEST = 2**63


class Section(BaseModel):
    """A part of a recipe: frozen, and no key but those declared."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value(cls, value: Any, info: ValidationInfo) -> Any:
        """Pydantic would read `true` as the number 1."""
        kind = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and kind is not bool and bool not in get_args(kind):
            raise ValueError("must not be true or false")
        return value


class BaseSection(Section):
    """The frozen decoder."""

    model: str
    """Name or path of a Hugging Face decoder, or `package:NAME/PATH`."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: Literal["none", "nf4", "int8"] = "none"
    """`nf4` and `int8` keep the frozen base in 4 or 8 bits through bitsandbytes."""
    attention: Literal["eager", "sdpa", "flex_attention", "flash_attention_2"] | None = None
    """None: what transformers chooses."""
    random_weights: bool = False
    """Random weights in the shape of the model's config: for measuring speed only."""


class VisionSection(Section):
    """The frozen vision encoder."""

    model: str
    """Name or path of a CLIP or SigLIP model, or `package:NAME/PATH`."""
    random_weights: bool = False
    cache_features: bool = False
    """The encoder looks at each image once, before training, and its features stay on disk."""
    cache_folder: Path | None = None
    """Where, for several runs to share; None: in the run directory."""
    cache_dtype: Literal["float16", "float32"] = "float16"
    feature_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of each image's feature channels that training sets to zero, other ones each step."""


class _RenamedSection(Section):
    """A section that takes the names of version 1 too."""

    @model_validator(mode="before")
    @classmethod
    def _of_version_1(cls, values: Any) -> Any:
        return from_version_1(values) if isinstance(values, dict) else values


class AdapterSection(_RenamedSection):
    """A preset of `AdapterConfig` with changes, or an adapter to go on from."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)

    preset: str = "v2"
    start: Path | None = None
    """An adapter directory whose weights and config training starts from, LoRA included. For
    `llama-adapter train` it may be a built-in model too: `photos` or `toy`."""

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.start is not None:
            if self.changes or "preset" in self.model_fields_set:
                found = ", ".join(sorted({*self.changes, *({"preset"} & self.model_fields_set)}))
                raise ValueError(f"start brings its own settings; remove {found}")
        else:
            self.adapter_config()
        return self

    @model_serializer(mode="wrap")
    def _as_given(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Together with `start` a preset would be refused when it is read back."""
        values: dict[str, Any] = dump(self)
        if self.start is not None:
            del values["preset"]
        return values

    @property
    def changes(self) -> dict[str, Any]:
        """Settings that differ from the preset's."""
        return dict(self.model_extra or {})

    def adapter_config(self) -> AdapterConfig:
        """The adapter's config; that of `start` is in its directory instead."""
        try:
            return AdapterConfig.preset(self.preset, **self.changes)
        except ConfigError as error:
            raise ValueError(str(error)) from error


class PromptSection(_RenamedSection):
    """How conversations become text; stored with the adapter."""

    template: str = "alpaca"
    """`chat` (the tokenizer's own) or a name of `processing.templates.TEMPLATES`."""
    placeholder_text: str | None = None
    """The placeholder of adapters whose `visual_scope` is `placeholders`."""


class SourceSection(Section):
    """One source of samples. Other keys belong to its `type`."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)

    type: str
    weight: float = Field(default=1.0, gt=0, le=MOST_WEIGHT)
    """How many times an epoch goes through the source; 0.5 takes another half each epoch."""
    held_out: int = Field(default=0, ge=0, lt=_LARGEST)
    """Samples kept out of training, for evaluation; all captions of an image or none."""
    max_invalid: float | None = Field(default=None, ge=0.0, le=1.0)
    """Share of invalid records above which training stops; None: `data.max_invalid`."""

    def options(self, types: SourceTypes) -> SourceOptions:
        """What the type makes of the other keys."""
        if self.type not in types:
            known = ", ".join(sorted(types))
            raise ConfigError(
                f"unknown source type {self.type!r}{did_you_mean(self.type, types)}; known: {known}"
            )
        return types[self.type].model_validate(self.model_extra or {})


class StreamSection(Section):
    """Where the batches of one kind come from, and their shape."""

    sources: tuple[SourceSection, ...] = Field(min_length=1)
    rows: int = Field(default=8, ge=1, le=MOST_ROWS)
    """Rows of a micro-batch, over all processes together; with padding a row is one sample."""
    row_length: int = Field(default=1024, ge=8, le=MOST_TOKENS)
    """Tokens of a row; longer conversations are cut at turn borders."""
    accumulation: int = Field(default=1, ge=1, le=MOST_ROWS)
    """Micro-batches of this kind in a step; their ratio between kinds is the mixture."""
    start: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the steps before this kind sets in: instructions first, then captions too."""
    every: int = Field(default=1, ge=1, le=MOST_STEPS)
    """Once all kinds have set in, this kind comes in every n-th step only."""


_DATA_KEYS_NOW = {"max_broken": "max_invalid", "overlong": "too_long"}
"""What recipes of version 0.1 call differently."""


class DataSection(Section):
    """How samples are read and laid into rows."""

    padding: Literal["packed", "padded", "max_length"] = "packed"
    """`packed`: many samples a row; `padded`: one a row, padded to the longest of the batch;
    `max_length`: one a row, padded to `row_length`."""
    workers: int = Field(default=2, ge=0, le=MOST_WORKERS)
    """Processes of each rank that read ahead, for each kind of batch; 0: none."""
    too_long: Literal["skip", "truncate"] = "skip"
    """What becomes of a single exchange longer than a row: an invalid record, or cut off."""
    max_invalid: float = Field(default=0.01, ge=0.0, le=1.0)
    """Share of invalid records above which training stops, of a source that says nothing else."""
    split_by_length: bool = False
    """Pass the short and the long rows of a padded micro-batch one after the other, where this
    saves time; in one process."""
    group_by_length: bool = False
    """Put samples of similar length into a micro-batch of padded rows."""
    cache: bool = True
    """Keep the samples' lengths in the run directory, so that a resumed run starts at once."""

    @model_validator(mode="before")
    @classmethod
    def _with_names_of_now(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        for old, new in _DATA_KEYS_NOW.items():
            if old in values and new in values:
                raise ValueError(f"{old} is the old name of {new}; both are given")
        return {_DATA_KEYS_NOW.get(key, key): value for key, value in values.items()}

    @model_validator(mode="after")
    def _padded(self) -> Self:
        for key in ("split_by_length", "group_by_length"):
            if getattr(self, key) and self.padding != "padded":
                raise ValueError(f"{key} needs padding 'padded', got {self.padding!r}")
        return self


class LanguageAnneal(Section):
    """How LANGUAGE's learning rates fall early, so that what reads images stays as it is."""

    until: float = Field(gt=0, le=1)
    """Share of the steps over which they fall, along a cosine."""
    factor: float = Field(ge=0, le=1)
    """What they are multiplied by from then on."""


class OptimizerSection(Section):
    """How the two losses update the two groups."""

    joint: Literal["disjoint", "naive"] = "disjoint"
    """`disjoint`: each loss updates its own group (V2 §4.2); `naive`: both update everything."""
    vision_lr: float = Field(default=1e-3, ge=0, allow_inf_nan=False)
    language_lr: float = Field(default=1e-3, ge=0, allow_inf_nan=False)
    gate_lr: float = Field(default=1e-2, ge=0, allow_inf_nan=False)
    """Gates start at zero and hold everything else back until they open."""
    projector_optimizer: Literal["adamw", "muon"] = "adamw"
    """Of the projector's matrices; not `muon` where FSDP2 shards them."""
    projector_lr: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Of the projector's matrices; None: `vision_lr`, or 0.01 with Muon."""
    language_anneal: LanguageAnneal | None = None
    """None: LANGUAGE's learning rates follow the schedule of all."""
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Of projections and prompts; gates, norms, biases and scales are never decayed."""
    warmup_steps: int = Field(default=20, ge=0, le=MOST_STEPS)
    """Steps over which learning rates rise from zero."""
    decay_share: float = Field(default=1.0, gt=0, le=1)
    """Last share of the steps, over which learning rates fall to zero along a cosine."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients of each group are clipped to this norm; `.inf`: they are not clipped."""


class LoraSection(Section):
    """LoRA on the base through `peft`, in addition to our groups; trained with LANGUAGE."""

    rank: int = Field(ge=1, le=MOST_RANK)
    alpha: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """None: twice the rank."""
    targets: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    lr: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """None: `language_lr`."""


class ComputeSection(Section):
    """Where and how precisely."""

    device: str | None = None
    """None: a GPU where there is one, else the CPU."""
    autocast: Literal["none", "bfloat16", "auto"] = "none"
    """Trainables stay float32 either way. `auto`: bfloat16 where the device is fast at it."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, non-reentrantly."""
    compile: bool = False
    strategy: Literal["auto", "ddp", "fsdp2"] = "auto"
    """`auto`: one process alone, or DDP when started as several; `fsdp2` shards the base too."""
    threads: int | None = Field(default=None, ge=1, le=MOST_WORKERS)
    """CPU threads of each process; None: as torch has it."""


class EvaluationSection(Section):
    """Scores of held-out samples during training."""

    every: int = Field(default=500, ge=1, le=MOST_STEPS)
    samples: int = Field(default=64, ge=1, lt=_LARGEST)
    """At most so many held-out samples of each source."""
    max_new_tokens: int = Field(default=40, ge=1, le=MOST_TOKENS)
    """Of a generated caption."""
    best: str | None = None
    """The metric whose best checkpoint is kept, such as `coco_captions.cider` or
    `alpaca.perplexity`; None: no best one is kept."""


class LoggingSection(Section):
    """What is written in addition to metrics.jsonl."""

    every: int = Field(default=10, ge=1, le=MOST_STEPS)
    """Steps between rows of trackers, and between rows of metrics.jsonl that hold the gates."""
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = "none"


class Recipe(Section):
    """A whole training run."""

    out: Path
    """The run directory."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    steps: int | None = Field(default=None, ge=1, le=MOST_STEPS)
    """Optimizer steps in all; with `minutes` at most so many."""
    minutes: float | None = Field(default=None, gt=0, le=MOST_MINUTES)
    """How long the run takes, from reading data to the last checkpoint. The number of steps then
    follows from the measured pace, and the schedule from that number."""
    checkpoint_every: int = Field(default=500, ge=1, le=MOST_STEPS)
    keep_checkpoints: int = Field(default=2, ge=1, le=MOST_STEPS)
    """The newest checkpoints that are kept."""
    base: BaseSection
    vision: VisionSection | None = None
    adapter: AdapterSection = AdapterSection()
    prompt: PromptSection = PromptSection()
    captions: StreamSection | None = None
    instructions: StreamSection | None = None
    data: DataSection = DataSection()
    optimizer: OptimizerSection = OptimizerSection()
    lora: LoraSection | None = None
    compute: ComputeSection = ComputeSection()
    evaluation: EvaluationSection | None = None
    logging: LoggingSection = LoggingSection()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.captions is None and self.instructions is None:
            raise ValueError("needs captions, instructions, or both")
        if self.steps is None and self.minutes is None:
            raise ValueError("needs steps, minutes, or both: how long to train")
        for key, least in (("start", 0), ("every", 1)):
            if min(getattr(section, key) for section in self.streams.values()) > least:
                names = " and ".join(f"{kind}s.{key}" for kind in self.streams)
                which = "one of them" if len(self.streams) > 1 else "it"
                raise ValueError(
                    f"{names} would leave steps without a batch: {which} must be {least}"
                )
        if self.captions is not None and self.vision is None:
            raise ValueError("captions need a vision encoder: give vision.model")
        blind = self.adapter.start is None and not self.adapter.adapter_config().is_multimodal
        if self.captions is not None and blind:
            raise ValueError("captions are of no use to an adapter with fusion 'none'")
        if self.evaluation is not None:
            self._check_scored(self.evaluation.best)
        return self

    def _check_scored(self, best: str | None) -> None:
        """Now, not hours later when held-out samples are scored for the first time."""
        names = self.held_out_kinds
        if not names:
            raise ValueError(
                "evaluation needs samples to score: set held_out of a source, or evaluation to null"
            )
        if best is not None and best.rpartition(".")[0] not in names:
            known = ", ".join(f"{name}.perplexity" for name in names)
            raise ValueError(f"evaluation.best names {best!r}, but the scores are {known}, ...")

    @property
    def held_out_kinds(self) -> dict[str, Kind]:
        """The kinds of held-out samples, by the names under which they are scored."""
        names: dict[str, Kind] = {}
        for kind, section in self.streams.items():
            for source in section.sources:
                if source.held_out:
                    names[free_name(source.type, names)] = kind
        return names

    @property
    def streams(self) -> dict[Kind, StreamSection]:
        """The sections that bring batches, by kind."""
        both: dict[Kind, StreamSection | None]
        both = {"caption": self.captions, "instruction": self.instructions}
        return {kind: section for kind, section in both.items() if section is not None}

    def most_invalid(self, source: SourceSection) -> float:
        """Share of a source's records that may be invalid."""
        return self.data.max_invalid if source.max_invalid is None else source.max_invalid

    def to_yaml(self) -> str:
        """The resolved recipe, every default written out; reads back as the same recipe."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def free_name(type_: str, taken: Collection[str]) -> str:
    """The name of a source's scores: its type, or `type-2` where that is taken."""
    number = 1
    while (name := type_ if number == 1 else f"{type_}-{number}") in taken:
        number += 1
    return name


def load_recipe(
    path: Path, overrides: Sequence[str] = (), *, types: SourceTypes = SOURCES
) -> Recipe:
    """Read and check a recipe; ConfigError names the file, the key and what is wrong with it.

    `types` are the source types that the recipe may name.
    """
    values = read_yaml(path, error=ConfigError)
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold keys and values, got {type(values).__name__}")
    for override in overrides:
        _override(values, override)
    return parse_recipe(values, types=types, name=str(path))


def parse_recipe(
    values: Mapping[str, Any], *, types: SourceTypes = SOURCES, name: str = "recipe"
) -> Recipe:
    """A recipe from plain values; ConfigError as of `load_recipe`."""
    fault = _odd_value(values, ())
    if fault is not None:
        raise ConfigError(f"{name}: {fault}")
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{name}: {_explain(error, Recipe)}") from error
    for kind, section in recipe.streams.items():
        for index, source in enumerate(section.sources):
            place = f"{kind}s.sources.{index}"
            try:
                source.options(types)
            except ValidationError as error:
                reason = _explain(error, types[source.type], before=place)
                raise ConfigError(f"{name}: {reason}") from error
            except ConfigError as error:
                raise ConfigError(f"{name}: {place}.type: {error}") from error
    return recipe


def _odd_value(value: Any, place: tuple[str, ...]) -> str | None:
    """Where a recipe holds something that no setting can be, and what; None: nowhere."""
    where = ".".join(map(_key, place)) or "recipe"
    if len(place) > _MOST_DEPTH:
        return f"{'.'.join(map(_key, place[:3]))}: is nested deeper than {_MOST_DEPTH} levels"
    if isinstance(value, str):
        odd = next((c for c in value if c == "\0" or "\ud800" <= c <= "\udfff"), None)
        return None if odd is None else f"{where}: holds the character {odd!a}, got {_short(value)}"
    if isinstance(value, int) and abs(value) >= _LARGEST:
        return f"{where}: must be smaller than 2**63, got an integer of {value.bit_length()} bits"
    if isinstance(value, float) and math.isnan(value):
        return f"{where}: must be a number, got nan"
    if value is None or isinstance(value, bool | int | float):
        return None
    if not isinstance(value, Mapping | list | tuple):
        return f"{where}: must be text, a number, a list or keys, got a {type(value).__name__}"
    pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
    for key, inner in pairs:
        if isinstance(value, Mapping) and (not isinstance(key, str) or _odd_value(key, place)):
            return f"{where}: keys must be plain text, got {_short(key)}"
        fault = _odd_value(inner, (*place, str(key)))
        if fault is not None:
            return fault
    return None


def _override(values: dict[str, Any], override: str) -> None:
    """Set one value from `key.path=value`; the value is read as YAML."""
    path, equals, text = override.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        raise ConfigError(f"an override is key.path=value, got {_short(override)}")
    shown = f"override {_short(override)}"
    if len(keys) > _MOST_DEPTH:
        raise ConfigError(f"{shown}: keys are nested deeper than {_MOST_DEPTH} levels")
    value = parse_yaml(text, name=f"the value of {shown}", error=ConfigError)
    inner: Any = values
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(inner, list):
            if not (key.isdecimal() and len(key) < 10 and int(key) < len(inner)):
                place = ".".join(keys[:depth])
                raise ConfigError(
                    f"{shown}: {place} is a list of {len(inner)}, "
                    f"so {_short(key)} must be a number below that"
                )
            position: Any = int(key)
        elif isinstance(inner, dict):
            position = key
            if not last and inner.get(key) is None:
                inner[key] = {}
        else:
            place = ".".join(keys[:depth])
            raise ConfigError(f"{shown}: {place} is {_short(inner)}, which has no keys")
        if last:
            inner[position] = value
        else:
            inner = inner[position]


def _explain(error: ValidationError, model: type[BaseModel], *, before: str = "") -> str:
    """All faults in one line, unknown keys with a suggestion."""
    faults = []
    # unknown keys first: what then is missing is often what they were meant to be
    for fault in sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden"):
        place = ".".join(_key(part) for part in ((before,) if before else ()) + fault["loc"])
        if fault["type"] == "extra_forbidden":
            known = _keys_at(model, fault["loc"][:-1])
            faults.append(f"{place}: unknown key{did_you_mean(fault['loc'][-1], known)}")
        elif fault["type"] == "missing":
            faults.append(f"{place}: is missing")
        else:
            faults.append(f"{place or 'recipe'}: {fault_text(fault)}")
    if len(faults) > _MOST_FAULTS:
        faults[_MOST_FAULTS:] = [f"and {len(faults) - _MOST_FAULTS} faults more"]
    return "; ".join(faults)


def _key(part: Any) -> str:
    text = str(part)
    return text if text.isprintable() and len(text) <= 60 else _short(text)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    cut = text if len(text) <= 60 else text[:57] + "..."
    return ascii(cut) if not cut.isprintable() else repr(cut) if isinstance(value, str) else cut


def _keys_at(model: type[BaseModel], place: Sequence[int | str]) -> Iterator[str]:
    """Keys of the section at a place of the recipe."""
    current: type[BaseModel] = model
    for part in place:
        if isinstance(part, str) and part in current.model_fields:
            found = next(_models_in(current.model_fields[part].annotation), None)
            current = found or current
    return iter(current.model_fields)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in getattr(annotation, "__args__", ()):
        yield from _models_in(inner)
