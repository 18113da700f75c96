"""Putting an adapter on a frozen decoder and taking it off again, leaving the base as it was."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llama_adapter.config import AdapterConfig, Targets, did_you_mean
from llama_adapter.errors import CheckpointError, ConfigError, UnsupportedModelError
from llama_adapter.model.attention_registry import (
    IMPLEMENTATIONS,
    PREFIX,
    capture_keys_values,
    register_attention,
)
from llama_adapter.model.gated_attention import AdaptionPrompt
from llama_adapter.model.groups import AdapterModule, Group
from llama_adapter.model.prompt_projection import Attention, project_prompt
from llama_adapter.model.scaled_linear import LearnedNorm, ScaledLinear
from llama_adapter.model.visual_prompts import VisualProjection


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
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

    Detached, the decoder is the very object graph it was before.
    """

    def __init__(
        self,
        language_model: PreTrainedModel,
        config: AdapterConfig,
        *,
        feature_size: int | None = None,
        generator: torch.Generator | None = None,
        check: bool = True,
    ) -> None:
        self.config = config
        self.language_model = language_model
        self.is_attached = False
        self.is_prepared = False
        attentions = attention_modules(language_model)
        self.num_layers = len(attentions)
        text_config = language_model.config.get_text_config()
        self.sites: list[Site] = []
        self._add_linears_and_norms(generator)
        self._add_prompts(attentions, text_config, generator)
        self.projection: VisualProjection | None = None
        if config.sees:
            if feature_size is None:
                raise ConfigError(
                    f"fusion {config.fusion!r} needs a vision tower; none was given "
                    "(fusion 'none' is text only)"
                )
            device = (
                attentions[0][1].o_proj.weight.device
                if hasattr(attentions[0][1], "o_proj")
                else next(language_model.parameters()).device
            )
            self.projection = VisualProjection(
                feature_size, int(text_config.hidden_size), config=config
            ).to(device)
        self.attach()
        if check:
            check_projections(language_model, attentions)

    def _add_linears_and_norms(self, generator: torch.Generator | None) -> None:
        config, decoder = self.config, self.language_model.get_decoder()
        linears = dict(decoder_linears(decoder))
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
                    generator=generator,
                )
                self._add_site(name, linear, module)
        if config.train_norms:
            for name, norm in decoder_norms(decoder):
                self._add_site(name, norm, LearnedNorm(norm))

    def _add_prompts(
        self,
        attentions: list[tuple[str, nn.Module]],
        text_config: object,
        generator: torch.Generator | None,
    ) -> None:
        config, total = self.config, self.num_layers
        visual = set(config.visual_layer_indices())
        static = set(config.prompt_layer_indices(total))
        for index, (name, attention) in enumerate(attentions):
            if index not in visual and index not in static:
                continue
            module = AdaptionPrompt(
                attention,
                num_heads=int(text_config.num_attention_heads),  # type: ignore[attr-defined]
                hidden_size=int(text_config.hidden_size),  # type: ignore[attr-defined]
                prompt_length=config.prompt_length if index in static else 0,
                visual=index in visual or config.fusion == "late",
                gate=config.gate,
                gate_scale=config.gate_scale,
                device=next(attention.parameters()).device,
                generator=generator,
            )
            self.sites.append(
                Site(
                    parent=attention,
                    attribute="adaption",
                    original=None,
                    name=readable_name(name),
                    module=module,
                )
            )

    def _add_site(self, name: str, original: nn.Module, module: AdapterModule) -> None:
        parent_name, _, attribute = name.rpartition(".")
        parent = self.language_model.get_decoder().get_submodule(parent_name)
        self.sites.append(
            Site(
                parent=parent,
                attribute=attribute,
                original=original,
                name=readable_name(name),
                module=module,
            )
        )

    def attach(self) -> None:
        """Put every module in its place and route attention through ours."""
        register_attention()
        current = self.language_model.config._attn_implementation.removeprefix(PREFIX)
        if current not in IMPLEMENTATIONS:
            raise UnsupportedModelError(
                f"attention implementation {current!r} cannot carry prompts; "
                f"supported: {', '.join(IMPLEMENTATIONS)}"
            )
        self.language_model.set_attn_implementation(PREFIX + current)
        for site in self.sites:
            setattr(site.parent, site.attribute, site.module)
        self.is_attached = True

    def detach(self) -> None:
        """Take every module off; the base computes exactly what it did before."""
        for site in self.sites:
            if site.original is None:
                delattr(site.parent, site.attribute)
            else:
                setattr(site.parent, site.attribute, site.original)
        self.is_attached = False

    def prompts(self) -> Iterator[tuple[nn.Module, AdaptionPrompt]]:
        """Every attention module that carries prompts, with them."""
        for site in self.sites:
            if isinstance(site.module, AdaptionPrompt):
                yield site.parent, site.module

    def modules(self) -> Iterator[tuple[str, AdapterModule]]:
        """Every module of this adapter by its readable name, the visual projection last."""
        for site in self.sites:
            yield site.name, site.module
        if self.projection is not None:
            yield "visual", self.projection

    def named_parameters(self, group: Group | None = None) -> Iterator[tuple[str, nn.Parameter]]:
        """Trainable parameters of one group (or both) by their names in adapter files."""
        for name, module in self.modules():
            if group is None or module.group == group:
                for inner, parameter in module.trainable_parameters():
                    yield f"{name}.{_file_name(module, inner)}", parameter

    def state_dict(self) -> dict[str, Tensor]:
        """What an adapter file holds: the trained numbers and nothing else."""
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
        for name, parameter in own.items():
            parameter.copy_(state[name])


def _file_name(module: AdapterModule, inner: str) -> str:
    if isinstance(module, ScaledLinear):
        return "bias" if inner == "bias_shift" else inner
    if isinstance(module, LearnedNorm):
        return inner.removeprefix("norm.")
    if isinstance(module, AdaptionPrompt) and module.prompt is None:
        return f"visual_{inner}"
    return inner


def readable_name(name: str) -> str:
    """Name of a decoder module in adapter files: `attention` whatever the family calls it."""
    return re.sub(r"\.self_attn(?=\.|$)", ".attention", name)


def attention_modules(language_model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """Self-attention modules of the decoder in layer order, by name.

    Raises UnsupportedModelError if there is not exactly one per layer.
    """
    decoder = language_model.get_decoder()
    if not isinstance(decoder, nn.Module):
        raise UnsupportedModelError(f"{type(language_model).__name__} has no decoder")
    found = [
        (int(module.layer_idx), name, module)  # type: ignore[arg-type]
        for name, module in decoder.named_modules()
        if isinstance(getattr(module, "layer_idx", None), int)
        and re.search("attention", type(module).__name__, re.IGNORECASE)
    ]
    expected = list(range(int(language_model.config.get_text_config().num_hidden_layers)))
    found.sort(key=lambda item: item[0])
    if [index for index, _, _ in found] != expected:
        raise UnsupportedModelError(
            f"{type(language_model).__name__}: expected one self-attention module in each of "
            f"{len(expected)} layers, found layers {[index for index, _, _ in found]}"
        )
    return [(name, module) for _, name, module in found]


def decoder_linears(decoder: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Linears inside decoder layers, by name; experts and routers of a mixture are left alone."""
    mixtures = [name for name, module in decoder.named_modules() if hasattr(module, "experts")]
    for name, module in decoder.named_modules():
        is_linear = hasattr(module, "in_features") and hasattr(module, "out_features")
        in_layer = re.search(r"(^|\.)\d+\.", name) is not None
        in_mixture = any(name == m or name.startswith(m + ".") for m in mixtures)
        if is_linear and in_layer and not in_mixture and not isinstance(module, ScaledLinear):
            yield name, module


def decoder_norms(decoder: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every norm of the decoder that has weights, the final one too."""
    for name, module in decoder.named_modules():
        if type(module).__name__.endswith("Norm") and any(True for _ in module.parameters()):
            yield name, module


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


@torch.no_grad()
def check_projections(
    language_model: PreTrainedModel, attentions: list[tuple[str, nn.Module]]
) -> None:
    """Refuse a family whose keys and values of a prompt we would compute differently.

    Each prompted module runs its own forward under the identity rotation; what reaches the
    attention function must be what `project_prompt` makes.
    """
    text_config = language_model.config.get_text_config()
    family = type(language_model).__name__
    for name, attention in attentions:
        parameter = next(attention.parameters())
        if not hasattr(attention, "adaption") or parameter.is_meta:
            continue
        dtype = parameter.dtype if parameter.is_floating_point() else language_model.dtype
        x_1Md = torch.linspace(-1, 1, 2 * int(text_config.hidden_size), device=parameter.device)
        x_1Md = x_1Md.view(1, 2, -1).to(dtype)
        keys, values = project_prompt(attention, x_1Md)
        cos = torch.ones(1, 2, _rotary_size(attention, keys.shape[-1]), device=x_1Md.device)
        cos = cos.to(dtype)
        try:
            with capture_keys_values() as captured:
                attention(
                    hidden_states=x_1Md,
                    position_embeddings=(cos, torch.zeros_like(cos)),
                    attention_mask=None,
                )
        except (TypeError, AttributeError, RuntimeError, ValueError) as error:
            raise UnsupportedModelError(
                f"{family} cannot be adapted: {name} does not run on its own ({error})"
            ) from error
        if not captured:
            raise UnsupportedModelError(
                f"{family} cannot be adapted: {name} does not use transformers' attention registry"
            )
        for what, ours, own in (("keys", keys, captured[0][0]), ("values", values, captured[0][1])):
            if ours.shape != own.shape or not torch.allclose(
                ours.float(), own.float(), rtol=1e-3, atol=1e-4
            ):
                raise UnsupportedModelError(
                    f"{family} cannot be adapted: {what} of a prompt in {name} would differ "
                    "from the module's own"
                )


def _rotary_size(attention: nn.Module, head_size: int) -> int:
    explicit = getattr(attention, "rotary_ndims", None)
    if explicit is not None:
        return int(explicit)
    parameters = getattr(attention.config, "rope_parameters", None) or {}
    if "partial_rotary_factor" not in parameters:  # nested by layer type, as in gemma3
        nested = [v for v in parameters.values() if isinstance(v, dict)]
        parameters = nested[0] if nested else parameters
    return int(head_size * parameters.get("partial_rotary_factor", 1.0))
