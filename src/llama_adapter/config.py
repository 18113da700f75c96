"""The settings of an adapter as one frozen value, and the published settings as presets.

V1, V2, chat and every released checkpoint are settings of the one mechanism described in
`docs/how-it-works.md`; nothing else in the package asks which of them it is running.
"""

from __future__ import annotations

import dataclasses
import difflib
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from llama_adapter.errors import ConfigError

IGNORE_INDEX = -100
"""Label of a token that no loss scores, as in PyTorch and transformers."""

FORMAT_VERSION = 2
"""Version of the adapter directory's format, which `adapter_config.json` states; 1 is read too."""

_NAMES_NOW = {"slot_reads": "placeholder_attention", "slot_text": "placeholder_text"}
_SCOPES_NOW = {"slots": "placeholders"}
"""What files of version 1 call differently."""

_MOST_LETTERS = 300
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 100

Fusion = Literal["early", "late", "none"]
VisualScope = Literal["all", "placeholders"]
PlaceholderAttention = Literal["all", "own"]
Projector = Literal["query_transformer", "linear", "mlp"]
Gate = Literal["tanh", "raw"]
ScaleSide = Literal["output", "input"]
ChannelOrder = Literal["rgb", "bgr"]
FrameRule = Literal["mean", "concat", "late-mean"]
VisionTokens = Literal["all", "patches", "class"]

CHOICES: dict[str, tuple[str, ...]] = {
    "fusion": get_args(Fusion),
    "visual_scope": get_args(VisualScope),
    "placeholder_attention": get_args(PlaceholderAttention),
    "projector": get_args(Projector),
    "gate": get_args(Gate),
    "scale_side": get_args(ScaleSide),
    "channel_order": get_args(ChannelOrder),
    "frame_rule": get_args(FrameRule),
    "vision_tokens": get_args(VisionTokens),
}

BOUNDS = {
    "prompt_length": (0, 1 << 16),
    "prompt_layers": (0, 10_000),
    "visual_prompt_length": (1, 1 << 16),
    "visual_layers": (1, 10_000),
    "projector_width": (1, 1 << 17),
    "projector_blocks": (1, 512),
    "projector_heads": (1, 1 << 12),
    "lora_rank": (0, 1 << 15),
}
"""The smallest value of every setting that counts something, and one that no model reaches."""

NEWER = frozenset({"projector_mlp_ratio", "vision_tokens"})
"""Settings that directories of version 0.1 do not have; every other one is always written."""

MOST_MLP_RATIO = 64
"""The largest `projector_mlp_ratio`."""

Targets = str | tuple[str, ...]
"""`"all"`, `"none"`, or names of linears inside a decoder layer (`q_proj`, `down_proj`, …)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterConfig:
    """What an adapter computes; together with its tensors, everything about it.

    Raises ConfigError at construction when a value is impossible. What depends on the base
    (how many layers it has) is checked when the adapter is attached, by `resolve`.
    """

    prompt_length: int = 10
    """Static prompts per adapted layer (V1 §3.1); 0 switches them off."""
    prompt_layers: int | None = None
    """How many of the last decoder layers carry static prompts; None: all that read no visual
    prompts of their own."""
    fusion: Fusion = "early"
    """`early`: visual prompts of their own in the first layers (V2 §4.3); `late`: the visual
    prompt is added to every static prompt (V1, released V2); `none`: text only."""
    visual_prompt_length: int = 20
    """Visual prompts per image; with late fusion it must be 1 or `prompt_length`."""
    visual_layers: int = 1
    """How many of the first decoder layers read visual prompts (early fusion)."""
    visual_scope: VisualScope = "all"
    """Which positions attend to visual prompts: `all` text tokens, or only `placeholders`."""
    placeholder_attention: PlaceholderAttention = "all"
    """What a placeholder attends to: `all` visual prompts of its image, or its `own` alone, the
    i-th placeholder the i-th prompt. Which object belongs to which need then not be learned."""
    projector: Projector = "query_transformer"
    """How vision features become visual prompts; see `model.projection.PROJECTORS`."""
    projector_width: int = 512
    """Width inside the `query_transformer` and `mlp` projectors."""
    projector_blocks: int = 2
    """Transformer blocks of the `query_transformer` projector."""
    projector_heads: int = 8
    """Attention heads of the `query_transformer` projector."""
    projector_mlp_ratio: float = 4.0
    """How many times wider the MLPs of the `query_transformer` projector's blocks are."""
    vision_feature: int | str = -1
    """Which layer of the vision encoder is read: an index into its hidden states (-1: its own
    output), or `projected` (CLIP: final norm and projection on every token)."""
    vision_tokens: VisionTokens = "all"
    """Which tokens of that layer are read: `all`, `patches` without class and register tokens, or
    the `class` token alone. A feature map has a patch token for each place."""
    frame_rule: FrameRule = "late-mean"
    """How several frames or images become one set of visual prompts: `mean` of features,
    `concat` of per-frame prompts, `late-mean` of per-frame prompts."""
    bias_targets: Targets = "all"
    """Linears with a learned bias (V2 §4.1)."""
    scale_targets: Targets = "all"
    """Linears with a learned scale (V2 §4.1)."""
    scale_side: ScaleSide = "output"
    """`output`: s ⊙ (W x + b₀ + b), the paper; `input`: W (s ⊙ x) + b₀ + b, the released chat
    model."""
    train_norms: bool = True
    """Whether every norm of the decoder is learned."""
    lora_rank: int = 0
    """Rank of LoRA (no alpha); prompts bypass it. 0 switches it off."""
    lora_targets: Targets = "all"
    """Linears with LoRA, where `lora_rank` is not 0."""
    gate: Gate = "tanh"
    """`tanh(g)` or the `raw` gate in front of prompt attention."""
    gate_scale: bool = False
    """A further learned scalar per layer times the gate (released LORA-BIAS checkpoints)."""
    channel_order: ChannelOrder = "rgb"
    """Channel order the adapter was trained with; the released multimodal models used `bgr`."""
    caption_instruction: str = ""
    """The instruction that asks for a caption, for adapters trained with a fixed one."""

    def __post_init__(self) -> None:
        self._check_values()
        self._check_fusion()

    def _check_values(self) -> None:
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ConfigError(
                    f"{name} must be one of {', '.join(map(repr, allowed))}, got {shown(value)}"
                    f"{did_you_mean(value, allowed)}"
                )
        for name, (least, most) in BOUNDS.items():
            value = getattr(self, name)
            if name == "prompt_layers" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(
                    f"{name} must be an integer of at least {least}, got {shown(value)}"
                )
            if value > most:
                raise ConfigError(f"{name} must be at most {most}, got {shown(value)}")
        for name in ("train_norms", "gate_scale"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, got {shown(getattr(self, name))}")
        ratio = self.projector_mlp_ratio
        is_number = isinstance(ratio, int | float) and not isinstance(ratio, bool)
        if not is_number or not 0 < ratio <= MOST_MLP_RATIO or self.projector_mlp_width < 1:
            raise ConfigError(
                f"projector_mlp_ratio must be a number above 0 and at most {MOST_MLP_RATIO}, "
                f"got {shown(ratio)}"
            )
        for name in ("bias_targets", "scale_targets", "lora_targets"):
            value = getattr(self, name)
            names = (value,) if isinstance(value, str) else value
            if not (
                isinstance(names, tuple) and names and all(isinstance(n, str) and n for n in names)
            ):
                raise ConfigError(
                    f"{name} must be 'all', 'none' or names of linears, got {shown(value)}"
                )
        layer = self.vision_feature
        is_layer = isinstance(layer, int) and not isinstance(layer, bool)
        if not is_layer and layer != "projected":
            raise ConfigError(
                f"vision_feature must be a layer index or 'projected', got {shown(layer)}"
            )
        if not isinstance(self.caption_instruction, str):
            raise ConfigError(
                f"caption_instruction must be text, got {shown(self.caption_instruction)}"
            )

    def _check_fusion(self) -> None:
        if self.fusion == "late":
            if self.prompt_length == 0:
                raise ConfigError("fusion 'late' adds to static prompts, but prompt_length is 0")
            if self.visual_prompt_length not in (1, self.prompt_length):
                raise ConfigError(
                    f"fusion 'late' adds visual prompts to the {self.prompt_length} static ones: "
                    f"visual_prompt_length must be 1 or {self.prompt_length}, "
                    f"got {self.visual_prompt_length}"
                )
        if self.placeholder_attention == "own":
            self._check_own_prompts()
        if self.projector == "query_transformer" and self.projector_width % self.projector_heads:
            raise ConfigError(
                f"projector_width {self.projector_width} is not a multiple of "
                f"projector_heads {self.projector_heads}"
            )

    def _check_own_prompts(self) -> None:
        needs = {"fusion": "early", "visual_scope": "placeholders"}
        for name, value in needs.items():
            if getattr(self, name) != value:
                raise ConfigError(
                    f"placeholder_attention 'own' needs {name} {value!r}, "
                    f"got {getattr(self, name)!r}"
                )
        if self.frame_rule == "concat":
            raise ConfigError(
                "placeholder_attention 'own' has no placeholders for frame_rule 'concat'"
            )

    @property
    def is_multimodal(self) -> bool:
        """Whether images have any influence."""
        return self.fusion != "none"

    @property
    def projector_mlp_width(self) -> int:
        """Width of the MLPs of the `query_transformer` projector's blocks."""
        return round(self.projector_width * self.projector_mlp_ratio)

    def visual_layer_indices(self) -> range:
        """Layers that read visual prompts of their own."""
        return range(self.visual_layers if self.fusion == "early" else 0)

    def prompt_layer_indices(self, num_layers: int) -> range:
        """Layers that carry static prompts.

        Raises ConfigError if the base has too few layers or static and visual layers overlap.
        """
        visual = len(self.visual_layer_indices())
        if visual > num_layers:
            raise ConfigError(f"visual_layers is {visual}, but the base has {num_layers} layers")
        if self.prompt_length == 0:
            return range(0)
        count = num_layers - visual if self.prompt_layers is None else self.prompt_layers
        if count > num_layers:
            raise ConfigError(f"prompt_layers is {count}, but the base has {num_layers} layers")
        if count + visual > num_layers:
            raise ConfigError(
                f"visual_layers {visual} + prompt_layers {count} exceed the base's "
                f"{num_layers} layers; the two must not overlap"
            )
        return range(num_layers - count, num_layers)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary; `from_dict` is its inverse."""
        values = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AdapterConfig:
        """Build from a dictionary; an unknown key is an error with a suggestion."""
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key in _NAMES_NOW:
                raise ConfigError(f"adapter setting {key!r} is called {_NAMES_NOW[key]!r} now")
            if key not in known:
                raise ConfigError(f"unknown adapter setting {shown(key)}{did_you_mean(key, known)}")
        checked: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        return cls(**checked)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> AdapterConfig:
        """A published setting by name, with changes.

        Raises ConfigError for an unknown preset or setting.
        """
        if name not in PRESETS:
            raise ConfigError(
                f"unknown preset {name!r}{did_you_mean(name, PRESETS)}; "
                f"known: {', '.join(sorted(PRESETS))}"
            )
        return cls.from_dict({**PRESETS[name], **overrides})


_LLAMA_BIAS = ("q_proj", "o_proj", "gate_proj", "down_proj", "up_proj")
_NO_LINEARS: dict[str, Any] = {
    "bias_targets": "none",
    "scale_targets": "none",
    "train_norms": False,
}
_RELEASED_PROJECTOR: dict[str, Any] = {
    "projector": "query_transformer",
    "projector_width": 768,
    "projector_blocks": 8,
    "projector_heads": 16,
    "vision_feature": "projected",
    "channel_order": "bgr",
}

PRESETS: dict[str, dict[str, Any]] = {
    # The paper (V2): early fusion in the first layer, everything else late.
    "v2": {},
    # V1, text: prompts in the last layers and nothing else (LLaMA-Adapter §3).
    "v1": {"fusion": "none", **_NO_LINEARS},
    # V1, multimodal: one pooled visual feature added to every static prompt (LLaMA-Adapter §3.3).
    "v1-multimodal": {
        "fusion": "late",
        "visual_prompt_length": 1,
        "projector": "linear",
        **_NO_LINEARS,
    },
    # V2's language group alone, for multi-turn chat.
    "v2-chat": {"fusion": "none"},
    # The released files, which differ from the paper (docs/released-checkpoints.md).
    "released-v1": {"fusion": "none", "prompt_layers": 30, **_NO_LINEARS},
    "released-v2-bias": {
        "fusion": "late",
        "prompt_layers": 31,
        "visual_prompt_length": 10,
        "bias_targets": _LLAMA_BIAS,
        "scale_targets": "none",
        **_RELEASED_PROJECTOR,
    },
    "released-v2-lora-bias": {
        "fusion": "late",
        "prompt_layers": 31,
        "visual_prompt_length": 10,
        "bias_targets": _LLAMA_BIAS,
        "scale_targets": "none",
        "lora_rank": 16,
        "gate_scale": True,
        **_RELEASED_PROJECTOR,
    },
    "released-v2-chat": {"fusion": "none", "prompt_length": 0, "scale_side": "input"},
}


def from_version_1(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of an adapter, a processor or a recipe by the names of version 2."""
    return _renamed(settings, _NAMES_NOW, _SCOPES_NOW)


def as_version_1(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse, for checksums that version 1 took of its own names."""
    names, scopes = ({now: before for before, now in n.items()} for n in (_NAMES_NOW, _SCOPES_NOW))
    return _renamed(settings, names, scopes)


def _renamed(
    settings: Mapping[str, Any], names: Mapping[str, str], scopes: Mapping[str, str]
) -> dict[str, Any]:
    renamed = {names.get(key, key): value for key, value in settings.items()}
    scope = renamed.get("visual_scope")
    if isinstance(scope, str):
        renamed["visual_scope"] = scopes.get(scope, scope)
    return renamed


def shown(value: object) -> str:
    """A value for a message: short, whatever it is."""
    return _SHORT.repr(value)


def differing(found: Any, expected: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Settings that both have, with other values: releases of transformers add and drop some."""
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in sorted(found.keys() & expected.keys()):
            yield from differing(found[key], expected[key], f"{name}.{key}" if name else key)
    elif found != expected:
        yield name, found, expected


def fault_text(fault: Mapping[str, Any]) -> str:
    """What pydantic says of a value, in one short line with the value, as after `seed: `."""
    message = fault["msg"].removeprefix("Value error, ")[:_MOST_LETTERS]
    found = fault["input"]
    is_section = isinstance(found, Mapping) or hasattr(found, "model_fields_set")
    return message[:1].lower() + message[1:] + ("" if is_section else f", got {shown(found)}")


def not_one_of(name: str, found: object, allowed: Iterable[str]) -> str:
    """What is said of a word that is none of the allowed ones."""
    known = list(allowed)
    return (
        f"{name} must be one of {', '.join(known)}, got {shown(found)}{did_you_mean(found, known)}"
    )


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for a near miss, else nothing."""
    close = difflib.get_close_matches(str(name)[:100], list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
