"""Putting an adapter on a frozen decoder and taking it off again, leaving the base as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llama_adapter.config import AdapterConfig, Targets, did_you_mean
from llama_adapter.errors import CheckpointError, ConfigError, UnsupportedModelError
from llama_adapter.families.compatibility import check_trainables
from llama_adapter.families.discovery import VISUAL, FoundAttention, discover
from llama_adapter.families.offloading import execution_device
from llama_adapter.families.structure import (
    Attention,
    decoder_of,
    family_of,
    readable_name,
)
from llama_adapter.model.attention_registry import (
    IMPLEMENTATIONS,
    PREFIX,
    register_attention,
    visual_context,
)
from llama_adapter.model.card import Terms
from llama_adapter.model.gated_attention import (
    GatedPrompt,
    LateFusionPrompt,
    StaticPrompt,
    VisualPrompt,
)
from llama_adapter.model.groups import AdapterModule, Group, Role, Trainable
from llama_adapter.model.projection import VisualProjection
from llama_adapter.model.routing import VisualPrompts
from llama_adapter.model.scaled_linear import LearnedNorm, ScaledLinear

PROJECTION = "visual"
"""Name of the visual projection in adapter files."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """One place in the decoder where an adapter module sits."""

    parent: nn.Module
    attribute: str
    original: nn.Module | None
    """What stood there before; None where the adapter adds a child."""
    name: str
    """Readable name in adapter files, such as `layers.3.mlp.up_proj`."""
    module: AdapterModule


class Adapter:
    """All modules of one adapter on one base; `attach` and `detach` are cheap and exact.

    Detached, the decoder is the same object graph as before.
    """

    def __init__(
        self,
        language_model: PreTrainedModel,
        config: AdapterConfig,
        *,
        feature_size: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        self.config = config
        self.language_model = language_model
        self.is_attached = False
        self.is_prepared = False
        """Whether plain modules replace the learned ones, for inference."""
        self.terms: Terms | None = None
        """Of the adapter that it was loaded from; they go where it is saved."""
        refuse_unroutable(language_model)
        if any(isinstance(module, AdapterModule) for module in language_model.modules()):
            raise ConfigError("this base carries an adapter already; load_adapter adds another one")
        text_config = language_model.config.get_text_config()
        self.targets: list[Target] = []
        self._merged: dict[AdapterModule, nn.Module] = {}
        self.projection: VisualProjection | None = None
        self._route()
        try:
            self.structure = discover(language_model)
            self.num_layers = len(self.structure.attentions)
            self._add_linears_and_norms(generator)
            visual = self._add_prompts(generator)
            width = visual[0].width if visual else int(text_config.hidden_size)
            home = execution_device(language_model.get_input_embeddings())
            if config.is_multimodal:
                if feature_size is None:
                    raise ConfigError(
                        f"fusion {config.fusion!r} needs a vision encoder; none was given "
                        "(fusion 'none' is text only)"
                    )
                self.projection = VisualProjection(feature_size, width, config=config).to(home)
        except BaseException:
            self._unroute()
            raise
        self.attach()
        try:
            self._check_trainables(torch.zeros(1, 1, width, device=home))
        except BaseException:  # also of memory: the base may be shared
            self.detach()
            raise

    def _check_trainables(self, prompts_IMd: Tensor) -> None:
        """Refuse a base in which anything would not learn, or images would do nothing."""
        wanted: list[tuple[str, Tensor]] = [
            (t.name, t.parameter) for t in self.trainables() if t.role != Role.PROJECTION
        ]
        inputs: dict[str, Any] = {}
        if self.config.is_multimodal:
            prompts_IMd.requires_grad_(True)
            wanted.append(("visual prompts", prompts_IMd))
            inputs[VISUAL] = VisualPrompts(prompts_IMd=prompts_IMd)
        check_trainables(
            self.language_model,
            wanted,
            lambda ids: self.call(self.language_model, input_ids=ids, use_cache=False, **inputs),
        )

    def call(self, function: Callable[..., Any], **inputs: Any) -> Any:
        """Call the decoder, or the model around it, so that visual prompts reach attention.

        Where a family hands no keywords on to it, they go around the decoder.
        """
        if self.structure.takes_visual_keyword or VISUAL not in inputs:
            return function(**inputs)
        visual = inputs.pop(VISUAL)
        if torch.compiler.is_compiling():
            raise UnsupportedModelError(
                f"{family_of(self.language_model)} cannot be compiled with images: it hands no "
                "keywords on to its attention"
            )
        with visual_context(visual):
            return function(**inputs)

    def _add_linears_and_norms(self, generator: torch.Generator | None) -> None:
        config = self.config
        linears = dict(self.structure.linears)
        kinds = {name.rsplit(".", 1)[1] for name in linears}
        biased = _resolve_targets(config.bias_targets, kinds, "bias_targets")
        scaled = _resolve_targets(config.scale_targets, kinds, "scale_targets")
        low_rank = _resolve_targets(config.lora_targets, kinds, "lora_targets")
        for name, linear in linears.items():
            kind = name.rsplit(".", 1)[1]
            lora_rank = config.lora_rank if kind in low_rank else 0
            if kind in biased or kind in scaled or lora_rank:
                module = ScaledLinear(
                    linear,
                    bias=kind in biased,
                    scale=kind in scaled,
                    scale_side=config.scale_side,
                    lora_rank=lora_rank,
                    is_masked=name in self.structure.masked,
                    generator=generator,
                )
                self._add_target(name, linear, module)
        if config.train_norms:
            for name, norm in self.structure.norms:
                self._add_target(name, norm, LearnedNorm(norm))

    def _add_prompts(self, generator: torch.Generator | None) -> list[FoundAttention]:
        """Prompts in the layers that carry them; the attention modules that read images."""
        config, reading = self.config, []
        static = set(config.prompt_layer_indices(self.num_layers))
        visual = set(config.visual_layer_indices())
        for index, found in enumerate(self.structure.attentions):
            if index not in visual and index not in static:
                continue
            gates: dict[str, Any] = {"gate": config.gate, "gate_scale": config.gate_scale}
            module: GatedPrompt
            if index in visual:
                module = VisualPrompt(found, **gates)
            else:
                kind = LateFusionPrompt if config.fusion == "late" else StaticPrompt
                module = kind(
                    found, prompt_length=config.prompt_length, generator=generator, **gates
                )
            if module.reads_images:
                reading.append(found)
            self._add_target(f"{found.name}.adaption", None, module)
        widths = {found.width for found in reading}
        if len(widths) > 1:
            raise UnsupportedModelError(
                f"{family_of(self.language_model)} cannot be adapted to see: layers that read "
                f"images have hidden states of several widths, {sorted(widths)}"
            )
        return reading

    def _add_target(self, name: str, original: nn.Module | None, module: AdapterModule) -> None:
        parent_name, _, attribute = name.rpartition(".")
        parent = decoder_of(self.language_model).get_submodule(parent_name)
        readable = readable_name(parent_name if original is None else name)
        self.targets.append(
            Target(
                parent=parent,
                attribute=attribute,
                original=original,
                name=readable,
                module=module,
            )
        )

    def attach(self) -> None:
        """Put every module in its place and route attention through ours."""
        self._route()
        for target in self.targets:
            module = self._merged.get(target.module, target.module)
            setattr(target.parent, target.attribute, module)

    def _route(self) -> None:
        register_attention()
        was_attached, self.is_attached = self.is_attached, True
        try:
            self.set_attn_implementation(self.language_model.config._attn_implementation)
        except UnsupportedModelError:
            self.is_attached = was_attached
            raise

    def _unroute(self) -> None:
        """The base's own attention again, where nothing else has been put on."""
        self.is_attached = False
        self.set_attn_implementation(self.language_model.config._attn_implementation)

    def check_route(self) -> None:
        """UnsupportedModelError where the base no longer routes attention through ours.

        Without it, prompts would do nothing and nobody would be told.
        """
        if not self.is_attached:
            return
        current = self.language_model.config._attn_implementation
        if not current.startswith(PREFIX):
            raise UnsupportedModelError(
                f"the base's attention was set to {current!r}, which carries no prompts; "
                "set_attn_implementation of the adapted model keeps them"
            )

    def set_attn_implementation(self, name: str) -> None:
        """Use another attention of transformers; UnsupportedModelError if it carries no prompts."""
        current = name.removeprefix(PREFIX)
        if current not in IMPLEMENTATIONS:
            raise UnsupportedModelError(
                f"attention implementation {name!r} cannot carry prompts; "
                f"supported: {', '.join(IMPLEMENTATIONS)}"
            )
        prefix = PREFIX if self.is_attached else ""
        self.language_model.set_attn_implementation(prefix + current)

    def detach(self) -> None:
        """Take every module off; the base computes exactly what it did before."""
        for target in self.targets:
            if target.original is None:
                delattr(target.parent, target.attribute)
            else:
                setattr(target.parent, target.attribute, target.original)
        self.is_attached = False

    def prepare(self) -> None:
        """Replace modules by plain ones of the base's kind, and keep keys of static prompts."""
        self.unprepare()
        was_attached = self.is_attached
        if not was_attached:
            self.attach()
        for attention, prompt in self.prompts():
            if isinstance(prompt, StaticPrompt):
                prompt.cache(attention, dtype=self.language_model.dtype)
        self.detach()
        for target in self.targets:
            plain = target.module.merged()
            if plain is not None:
                self._merged[target.module] = plain.train(target.module.training)
        self.is_prepared = True
        if was_attached:
            self.attach()

    def unprepare(self) -> None:
        """Undo `prepare`: every trainable computes and learns again."""
        self._merged.clear()
        self.is_prepared = False
        for _, prompt in self.prompts():
            if isinstance(prompt, StaticPrompt):
                prompt.drop_cache()
        if self.is_attached:
            self.attach()

    def prompts(self) -> Iterator[tuple[Attention, GatedPrompt]]:
        """Every attention module that carries prompts, with them."""
        for target in self.targets:
            if isinstance(target.module, GatedPrompt):
                yield cast(Attention, target.parent), target.module

    def modules(self) -> Iterator[tuple[str, AdapterModule]]:
        """Every module of this adapter by its readable name, the visual projection last."""
        for target in self.targets:
            yield target.name, target.module
        if self.projection is not None:
            yield PROJECTION, self.projection

    def trainables(self, group: Group | None = None) -> Iterator[Trainable]:
        """Trainable parameters of one group (or both), under their full names in adapter files."""
        for name, module in self.modules():
            if group is None or module.group == group:
                for trainable in module.trainables():
                    yield trainable._replace(name=f"{name}.{trainable.name}")

    def named_parameters(self, group: Group | None = None) -> Iterator[tuple[str, nn.Parameter]]:
        """The same as pairs of name and parameter."""
        for trainable in self.trainables(group):
            yield trainable.name, trainable.parameter

    def places(self) -> dict[str, tuple[AdapterModule, str]]:
        """In which module each trainable parameter is, by its name in adapter files."""
        found = {}
        for name, module in self.modules():
            inner = {id(parameter): inner for inner, parameter in module.named_parameters()}
            for trainable in module.trainables():
                found[f"{name}.{trainable.name}"] = (module, inner[id(trainable.parameter)])
        return found

    def state_dict(self) -> dict[str, Tensor]:
        """What an adapter file holds: the trained weights and nothing else."""
        return {name: p.detach() for name, p in self.named_parameters()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor], *, source: str) -> None:
        """Take over every tensor; strict both ways.

        Raises CheckpointError that names missing, unexpected or misshapen tensors in `source`.
        """
        own = dict(self.named_parameters())
        missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        if missing or extra:
            found = [f"lacks {missing[:3]} ({len(missing)} in all)"] if missing else []
            found += [f"has unexpected {extra[:3]} ({len(extra)} in all)"] if extra else []
            raise CheckpointError(f"{source} {' and '.join(found)}; it does not fit this base")
        for name, parameter in own.items():
            if state[name].shape != parameter.shape:
                raise CheckpointError(
                    f"{source}: tensor {name} has shape {list(state[name].shape)}, "
                    f"this base expects {list(parameter.shape)}"
                )
            if not state[name].isfinite().all():
                raise CheckpointError(f"{source}: tensor {name} has values that are not finite")
        for name, parameter in own.items():
            parameter.copy_(state[name])


def _resolve_targets(targets: Targets, kinds: set[str], setting: str) -> set[str]:
    if targets == "none":
        return set()
    if targets == "all":
        return kinds
    wanted = (targets,) if isinstance(targets, str) else targets
    for name in wanted:
        if name not in kinds:
            raise ConfigError(
                f"{setting} names {name!r}, but the base's linears are "
                f"{', '.join(sorted(kinds))}{did_you_mean(name, kinds)}"
            )
    return set(wanted)


def refuse_unroutable(language_model: PreTrainedModel) -> None:
    """Refuse, by name, a family whose attention does not go through transformers' registry.

    Such a family would log a warning, and the adapter would do nothing.
    """
    if not language_model._can_set_attn_implementation():
        raise UnsupportedModelError(
            f"{family_of(language_model)} cannot be adapted: its attention does not use "
            "transformers' attention registry"
        )
