"""The adapted model: frozen decoder, frozen vision encoder and adapters as one Hugging Face model.

The only place where vision meets language.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import TransformersKwargs

from llama_adapter.config import AdapterConfig, did_you_mean
from llama_adapter.errors import ConfigError, TrainingError, UnsupportedModelError
from llama_adapter.families.compatibility import check_branches, check_packing, mask_for
from llama_adapter.families.multimodal import text_decoder_of
from llama_adapter.families.offloading import execution_device
from llama_adapter.families.quantized import keep_unfused, keep_unpacked
from llama_adapter.families.structure import CACHE, decoder_of
from llama_adapter.families.vision import vision_encoder_of, vision_feature_size, vision_features
from llama_adapter.model.adapter import Adapter
from llama_adapter.model.attention_registry import PAGED, same_visual_context
from llama_adapter.model.backbone import Backbone
from llama_adapter.model.configuration import LlamaAdapterConfig
from llama_adapter.model.groups import Group
from llama_adapter.model.loss import answer_loss, masked_head
from llama_adapter.model.peft_base import on_base, unwrapped
from llama_adapter.model.places import positions_of
from llama_adapter.model.references import (
    describe_model,
    load_language_model,
    load_vision,
    what_differs,
)
from llama_adapter.model.routing import VisualPrompts, route
from llama_adapter.model.trainer_checkpoints import TrainerCheckpoints
from llama_adapter.model.visual_generation import VisualGenerationMixin
from llama_adapter.pretrained import seeded


class LlamaAdapterForConditionalGeneration(
    TrainerCheckpoints, VisualGenerationMixin, PreTrainedModel
):
    """A frozen text LLM that reads images through a small adapter.

    Build one with `from_base`, or load one with `from_pretrained`. The base's weights never
    change; `disable_adapters` gives it back exactly.
    """

    config_class = LlamaAdapterConfig
    main_input_name = "input_ids"
    base_model_prefix = "backbone"
    accepts_loss_kwargs = True
    """For Hugging Face's Trainer: the loss is divided by the `num_items_in_batch` of a step."""
    input_modalities = ("image", "text")
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _is_stateful: ClassVar[bool] = False

    def __init__(
        self,
        config: LlamaAdapterConfig,
        *,
        language_model: PreTrainedModel,
        vision: nn.Module | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        config.bind_text_config(language_model.config.get_text_config())
        super().__init__(config)
        self._on_base = on_base(language_model)
        """What peft has put on the base."""
        self._changed: str | None = None
        """A tensor of the base that is not as in the files of its name."""
        self.language_model = language_model.requires_grad_(False)
        self.vision: PreTrainedModel | None = None if vision is None else vision_encoder_of(vision)
        self.generation_config = language_model.generation_config
        self._no_split_modules = getattr(language_model, "_no_split_modules", None)
        self.all_tied_weights_keys: dict[str, str] = {}
        keep_unpacked(language_model)
        self._keeps_samples_apart = False
        """Whether it is proven that the base keeps the samples of a packed row apart."""
        self._keeps_branches_apart = False
        """The same for branches behind one prompt, which a mask tells apart."""
        self._adapters: dict[str, Adapter] = {}
        self.active_adapter: str = "default"
        self.visual: nn.Module | None = None
        self._adapters["default"] = self._new_adapter(config.adapter_config, generator=generator)
        self.visual = self._adapters["default"].projection
        self.train(language_model.training)

    @classmethod
    def from_base(
        cls,
        language_model: PreTrainedModel | str,
        vision: nn.Module | str | None = None,
        config: LlamaAdapterConfig | None = None,
        *,
        seed: int | None = None,
        dtype: torch.dtype | str | None = None,
        device_map: Any = None,
        offload_folder: str | Path | None = None,
        quantization_config: Any = None,
        attn_implementation: str | None = None,
    ) -> LlamaAdapterForConditionalGeneration:
        """A fresh adapter on a base: it changes the base's logits by exactly 0.0.

        `language_model` and `vision` are loaded transformers models, or names or paths (then
        `dtype`, `device_map`, `quantization_config`, `attn_implementation` apply;
        `offload_folder` is where a `device_map` with `disk` may write). What learns and the
        vision encoder stay where the base computes. Without `vision` the config's fusion becomes
        `none`.

        Raises UnsupportedModelError for a family that cannot be adapted and ConfigError for
        a setting that the base cannot carry.
        """
        changed = None
        if not isinstance(language_model, str):
            language_model = text_decoder_of(unwrapped(language_model))
            changed = what_differs(language_model)
        else:
            language_model = load_language_model(
                language_model,
                dtype=dtype,
                device_map=device_map,
                offload_folder=offload_folder,
                quantization_config=quantization_config,
                attn_implementation=attn_implementation,
            )
        if isinstance(vision, str):
            home = execution_device(language_model.get_input_embeddings())
            vision = load_vision(vision, device=home)
        if config is None:
            config = LlamaAdapterConfig()
        adapter_config = config.adapter_config
        if vision is None and adapter_config.is_multimodal:
            adapter_config = AdapterConfig.from_dict({**adapter_config.to_dict(), "fusion": "none"})
        config = LlamaAdapterConfig(
            adapter=adapter_config,
            base=describe_model(language_model),
            vision=None if vision is None else describe_model(vision),
        )
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        with seeded(seed):
            model = cls(config, language_model=language_model, vision=vision, generator=generator)
        model._changed = changed
        return model

    def _new_adapter(
        self, adapter_config: AdapterConfig, *, generator: torch.Generator | None = None
    ) -> Adapter:
        size = None
        if adapter_config.is_multimodal and self.vision is not None:
            size = vision_feature_size(self.vision, adapter_config)
        return Adapter(self.language_model, adapter_config, feature_size=size, generator=generator)

    # --- the forward pass -------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        visual_features: Tensor | None = None,
        visual_prompts: VisualPrompts | None = None,
        image_index: Tensor | None = None,
        visual_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_answer_tokens: Tensor | int | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Any = None,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits [B, T, vocab], and the loss if `labels` [B, T] are given.

        Images come as `pixel_values` [I, 3, H, W] (or [I, F, 3, H, W] for frames), as
        `visual_features` [I, P, C] of the encoder, or as `visual_prompts` of `encode_visual`.
        `image_index` says which image each row [B] or token [B, T] reads, -1 for none
        (default: row i reads image i); `visual_mask` [B, T] which tokens read at all. Behind a
        cache the two cover the tokens of this pass or all so far. Without `position_ids`
        positions are counted from a 2-D `attention_mask`, so that a left-padded row is as alone.
        A 4-D one [B, 1, T, T] (bool) says which tokens each sees, whatever the base's attention.
        The loss is cross-entropy over answer tokens (labels other than -100, shifted here),
        divided by `num_answer_tokens` (by its name in Hugging Face's Trainer:
        `num_items_in_batch`; default: those of this batch). `logits_to_keep` is as in
        transformers, or a mask [B, T] (`answer_mask`): then the logits are those of the N
        positions where it is true, as [1, N, vocab]. `cache` is the name of `past_key_values` since
        5.24. Other keywords are those of the base's own forward.

        Raises ConfigError for a keyword that neither knows.
        """
        inputs = self.decoder_inputs(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            visual_features=visual_features,
            visual_prompts=visual_prompts,
            image_index=image_index,
            visual_mask=visual_mask,
            use_cache=use_cache,
            cache=cache,
            **kwargs,
        )
        if return_dict is not None:
            inputs["return_dict"] = True
        with masked_head(self.get_output_embeddings(), logits_to_keep) as kept:
            output = self.adapter.call(self.language_model, **inputs, logits_to_keep=kept)
        if labels is not None:
            total = num_items_in_batch if num_answer_tokens is None else num_answer_tokens
            loss = answer_loss(output.logits, labels, num_answer_tokens=total, kept=logits_to_keep)
            # made again, for the loss to come first in the tuple that it also is
            output = type(output)(**{**output, "loss": loss})
        return output.to_tuple() if return_dict is False else output

    def decoder_inputs(
        self,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        visual_features: Tensor | None = None,
        visual_prompts: VisualPrompts | None = None,
        image_index: Tensor | None = None,
        visual_mask: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What the frozen decoder is called with, for the same keywords as `forward`."""
        self.adapter.check_route()
        if kwargs:
            self._refuse_unknown(kwargs)
        known = past_key_values if cache is None else cache
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        num_rows, num_tokens = (0, 0) if tokens is None else tokens.shape[:2]
        if visual_prompts is None and (pixel_values is not None or visual_features is not None):
            visual_prompts = self.encode_visual(pixel_values, visual_features=visual_features)
        if visual_prompts is not None:
            if visual_mask is None and self.adapter_config.visual_scope == "placeholders":
                raise ConfigError(
                    "visual_scope is 'placeholders': visual_mask must say which tokens are"
                )
            routing = route(
                num_images=len(visual_prompts.prompts_IMd),
                num_rows=num_rows,
                num_tokens=num_tokens,
                image_index=image_index,
                visual_mask=visual_mask,
                one_to_one=self.adapter_config.placeholder_attention == "own",
                cache=known,
            )
            visual_prompts = visual_prompts.routed(routing)
        if attention_mask is None:
            use_cache = self._apart(position_ids, known, use_cache, kwargs)
        elif position_ids is None and getattr(attention_mask, "ndim", 0) == 2 and num_tokens:
            position_ids = positions_of(attention_mask, num_tokens=num_tokens, cache=known)
        elif getattr(attention_mask, "ndim", 0) == 4 and attention_mask.dtype == torch.bool:
            if not self._keeps_branches_apart and not torch.compiler.is_compiling():
                check_branches(self.language_model)
                self._keeps_branches_apart = True
            attention_mask = mask_for(self.language_model, attention_mask)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "use_cache": use_cache,
            **kwargs,
        }
        inputs = {name: value for name, value in inputs.items() if value is not None}
        if known is not None:
            inputs[CACHE] = known
        if visual_prompts is not None:
            inputs["visual_prompts"] = visual_prompts
        return inputs

    @functools.cached_property
    def known_keywords(self) -> frozenset[str]:
        """Keywords that `forward` knows: its own, the base's, and those of every model."""
        base = self.language_model
        ways = (type(self).forward, type(base).forward, type(decoder_of(base)).forward)
        named = {name for way in ways for name in inspect.signature(way).parameters}
        # those of continuous batching pass: attention refuses them and says why
        named |= {*TransformersKwargs.__optional_keys__, *PAGED}
        return frozenset(named - {"self", "kwargs"})

    def _refuse_unknown(self, kwargs: dict[str, Any]) -> None:
        for name in kwargs:
            if name not in self.known_keywords:
                near = did_you_mean(name, self.known_keywords)
                raise ConfigError(f"forward has no keyword {name!r}{near}")

    def _apart(
        self,
        position_ids: Tensor | None,
        known: Any,
        use_cache: bool | None,
        kwargs: dict[str, Any],
    ) -> bool | None:
        """Keep samples that share a row apart: `use_cache` for that; refuse where they would mix.

        transformers tells them apart by positions that restart, and only without a cache.
        """
        uncached = known is None and use_cache is False
        if torch.compiler.is_compiling() or (uncached and self._keeps_samples_apart):
            return use_cache
        packed = kwargs.get("cu_seq_lens_q") is not None or (
            position_ids is not None
            and position_ids.shape[-1] > 1
            and bool((position_ids[..., 1:] <= position_ids[..., :-1]).any())
        )
        if not packed:
            return use_cache
        if known is not None or use_cache:
            raise ConfigError(
                "position_ids restart, as where samples share a row, and such rows cannot be "
                "cached: their samples would be mixed; pass use_cache=False and no cache"
            )
        if not self._keeps_samples_apart:
            check_packing(self.language_model)
            self._keeps_samples_apart = True
        return False

    def encode_visual(
        self,
        pixel_values: Tensor | None = None,
        *,
        visual_features: Tensor | None = None,
        cache: bool = False,
    ) -> VisualPrompts | None:
        """Visual prompts of images; None if the active adapter reads none.

        `cache` also makes the keys and gated values of every layer that reads them alone, for
        many forward passes with the same weights: for inference only.
        Raises ConfigError if the model has no vision encoder to read pixels with.
        """
        if self.visual is None:
            return None
        if visual_features is None:
            if self.vision is None:
                raise ConfigError("images were given, but this model has no vision encoder")
            assert pixel_values is not None
            visual_features = vision_features(
                self.vision, pixel_values.to(execution_device(self.vision)), self.adapter_config
            )
        prompts_IMd = self.visual(visual_features.to(execution_device(self.visual))).to(self.device)
        visual = VisualPrompts(prompts_IMd=prompts_IMd)
        return self._with_keys(visual) if cache else visual

    @torch.no_grad()
    def _with_keys(self, visual: VisualPrompts) -> VisualPrompts:
        kept = {}
        for attention, prompt in self._adapters[self.active_adapter].prompts():
            if prompt.reads_images:
                entries_EMd = prompt.image_entries_EMd(visual, fallback=True)
                kept[prompt.layer_index] = prompt.keys_values(attention, entries_EMd)
        return replace(visual, cache=kept)

    # --- parameters -------------------------------------------------------------------------

    @property
    def adapter_config(self) -> AdapterConfig:
        """Settings of the active adapter."""
        return self._adapters[self.active_adapter].config

    @property
    def adapter(self) -> Adapter:
        """The active adapter's modules."""
        return self._adapters[self.active_adapter]

    def group_parameters(self, group: Group | str) -> list[nn.Parameter]:
        """Trainable parameters of one of the two disjoint groups, `vision` or `language`."""
        return [p for _, p in self.adapter.named_parameters(Group(group))]

    def prepare_for_inference(self) -> None:
        """Merge bias and scale into plain linears and keep keys and values of static prompts.

        Same logits to rounding, at the base model's speed; needs memory for a second copy of the
        adapted weights. Undone by `prepare_for_training`; until then nothing learns. Quantized
        linears stay unmerged.
        """
        self.adapter.prepare()
        self.eval()

    def prepare_for_training(self) -> None:
        """Undo `prepare_for_inference`: every trainable computes and learns again."""
        self.adapter.unprepare()

    def disable_adapters(self) -> None:
        """Take the active adapter off: the base, exactly."""
        if self.adapter.is_attached:
            self.adapter.detach()
            self.visual = None

    def enable_adapters(self) -> None:
        """Put the active adapter back on."""
        if not self.adapter.is_attached:
            self.adapter.attach()
            self.visual = self.adapter.projection

    @contextmanager
    def adapters_disabled(self) -> Iterator[None]:
        """The base alone within a block."""
        was_attached = self.adapter.is_attached
        self.disable_adapters()
        try:
            yield
        finally:
            if was_attached:
                self.enable_adapters()

    def set_adapter(self, adapter_name: str) -> None:
        """Make a loaded adapter the active one; ConfigError if there is none of that name."""
        self._loaded(adapter_name)
        self.disable_adapters()
        self.active_adapter = adapter_name
        self.enable_adapters()

    def add_adapter(
        self,
        config: LlamaAdapterConfig | AdapterConfig,
        adapter_name: str,
        *,
        seed: int | None = None,
    ) -> None:
        """Add a fresh adapter to the others; `set_adapter` makes it the active one.

        Raises ConfigError for a name that is taken or a config of another library.
        """
        if adapter_name in self._adapters:
            raise ConfigError(f"an adapter named {adapter_name!r} is loaded already")
        adapter_config = config.adapter_config if isinstance(config, LlamaAdapterConfig) else config
        if not isinstance(adapter_config, AdapterConfig):
            raise ConfigError(
                f"add_adapter takes a LlamaAdapterConfig, got {type(config).__name__} "
                "(peft's adapters go onto the base before from_base)"
            )
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        with self.adapters_disabled(), seeded(seed):
            adapter = self._new_adapter(adapter_config, generator=generator)
            adapter.detach()
        self._adapters[adapter_name] = adapter

    def delete_adapter(self, adapter_names: str | list[str]) -> None:
        """Forget loaded adapters, but not the active one; all of them or, with an error, none."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for name in names:
            self._loaded(name)
            if name == self.active_adapter:
                raise ConfigError(
                    f"adapter {name!r} is the active one; set_adapter another before deleting it"
                )
        for name in names:
            self._adapters.pop(name, None)

    def active_adapters(self) -> list[str]:
        """The active adapter's name, in a list as in transformers; empty while it is off."""
        return [self.active_adapter] if self.adapter.is_attached else []

    def get_adapter_state_dict(self, adapter_name: str | None = None) -> dict[str, Tensor]:
        """What an adapter's file holds, by default of the active one."""
        return self._loaded(adapter_name or self.active_adapter).state_dict()

    def enable_peft_hotswap(self, *_args: Any, **_kwargs: Any) -> None:
        """Raise ConfigError: adapters are loaded side by side and switched by `set_adapter`."""
        raise ConfigError(
            "peft's hot-swapping is not for these adapters; load_adapter adds one to the "
            "others and set_adapter switches"
        )

    def _loaded(self, name: str) -> Adapter:
        if name not in self._adapters:
            known = ", ".join(sorted(self._adapters))
            raise ConfigError(
                f"no adapter {name!r}; loaded: {known}{did_you_mean(name, self._adapters)}"
            )
        return self._adapters[name]

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the loaded adapters."""
        return tuple(self._adapters)

    def train(self, mode: bool = True) -> LlamaAdapterForConditionalGeneration:
        if mode and self.adapter.is_prepared:
            raise TrainingError(
                f"adapter {self.active_adapter!r} is prepared for inference and would not learn; "
                "call prepare_for_training() first"
            )
        super().train(mode)
        keep_unpacked(self.language_model)
        keep_unfused(self.language_model)
        if self.vision is not None:
            self.vision.eval()  # the encoder is frozen, dropout included
        return self

    def _apply(
        self, fn: Callable[[Tensor], Tensor], recurse: bool = True
    ) -> LlamaAdapterForConditionalGeneration:
        super()._apply(fn, recurse)
        # `to`, `cuda` and the like reach adapters that are off, and modules that are merged away
        reached = set(self.modules())
        for adapter in self._adapters.values():
            for _, module in adapter.modules():
                for part in set(module.modules()) - reached:
                    part._apply(fn, recurse=False)
                reached.update(module.modules())
        return self

    # --- what transformers asks of a model --------------------------------------------------

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def get_decoder(self) -> nn.Module:
        return decoder_of(self.language_model)

    def set_attn_implementation(
        self, attn_implementation: str | dict[str, str], allow_all_kernels: bool = False
    ) -> None:
        """Another attention for the base, with the adapter's prompts in it."""
        if not isinstance(attn_implementation, str) or allow_all_kernels:
            raise UnsupportedModelError("an adapted model takes the name of one attention")
        self.adapter.set_attn_implementation(attn_implementation)

    @property
    def backbone(self) -> Backbone:
        """The model without its head, as `base_model` of transformers: hidden states of inputs."""
        return Backbone(self)

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,  # noqa: ARG002
    ) -> nn.Module:
        """The embeddings as they are: the base is frozen, and an adapter belongs to it as it is.

        Raises ConfigError, and changes nothing, where another number of tokens is asked for.
        """
        embeddings = self.get_input_embeddings()
        assert isinstance(embeddings.weight, Tensor)
        rows = embeddings.weight.shape[0]
        wanted = rows if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of:
            wanted = -(-wanted // pad_to_multiple_of) * pad_to_multiple_of
        if wanted != rows:
            raise ConfigError(
                f"the base has embeddings of {rows} tokens and is frozen, {wanted} were asked "
                "for: resize and save the base first, then attach an adapter to it"
            )
        return embeddings

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Recompute activations in the backward pass, always non-reentrant.

        The keywords are those of `torch.utils.checkpoint.checkpoint`; `options` go to the base's
        method (`every_n_layers`, `offload`). Raises ConfigError for `use_reentrant=True`, which
        would lose gradients of whatever learns in a layer.
        """
        keywords = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        if not self.adapter.structure.takes_visual_keyword:
            keywords["context_fn"] = same_visual_context
        if keywords["use_reentrant"]:
            raise ConfigError(
                "gradient checkpointing with use_reentrant=True would lose gradients; leave it "
                "out or pass False"
            )
        self._checkpointing("enable")(keywords, **options)

    def gradient_checkpointing_disable(self) -> None:
        self._checkpointing("disable")()

    def _checkpointing(self, action: str) -> Callable[..., None]:
        """The base's method, by its newer name where transformers has it."""
        old = getattr(self.language_model, f"gradient_checkpointing_{action}")
        method: Callable[..., None]
        method = getattr(self.language_model, f"activation_checkpointing_{action}", old)
        return method

    @property
    def device(self) -> torch.device:
        """Where inputs go: the embedding computes there, wherever its weights are kept."""
        return execution_device(self.get_input_embeddings())

    @property
    def dtype(self) -> torch.dtype:
        return self.language_model.dtype
