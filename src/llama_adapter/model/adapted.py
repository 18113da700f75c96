"""The adapted model: frozen decoder, frozen vision tower and adapters as one Hugging Face model.

The only place where vision meets language.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from llama_adapter.config import AdapterConfig
from llama_adapter.errors import ConfigError, TrainingError, UnsupportedModelError
from llama_adapter.model.attach import Adapter
from llama_adapter.model.configuration import LlamaAdapterConfig
from llama_adapter.model.gated_attention import VisualPrompts, begins_among_slots
from llama_adapter.model.groups import Group
from llama_adapter.model.last_layer import last_layer_at
from llama_adapter.model.loss import answer_loss, is_places, logits_at
from llama_adapter.model.persistence import AdapterPersistence
from llama_adapter.model.quantised import keep_unpacked
from llama_adapter.model.references import describe_model, load_language_model, load_vision
from llama_adapter.model.visual_generation import CACHE, VisualGenerationMixin
from llama_adapter.model.visual_prompts import (
    VisionTower,
    vision_feature_size,
    vision_features,
    vision_tower_of,
)


class LlamaAdapterForConditionalGeneration(
    AdapterPersistence, VisualGenerationMixin, PreTrainedModel
):
    """A frozen text LLM that reads pictures through a small adapter.

    Build one with `from_base`, or load one with `from_pretrained`. The base's numbers never
    change; `disable_adapters` gives it back exactly.
    """

    config_class = LlamaAdapterConfig
    main_input_name = "input_ids"
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
        self.language_model = language_model.requires_grad_(False)
        self.vision: VisionTower = None if vision is None else vision_tower_of(vision)
        self.generation_config = language_model.generation_config
        self._no_split_modules = getattr(language_model, "_no_split_modules", None)
        self.all_tied_weights_keys: dict[str, str] = {}
        keep_unpacked(language_model)
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
        quantization_config: Any = None,
        attn_implementation: str | None = None,
    ) -> LlamaAdapterForConditionalGeneration:
        """A fresh adapter on a base: it changes the base's logits by exactly 0.0.

        `language_model` and `vision` are loaded transformers models, or names or paths (then
        `dtype`, `device_map`, `quantization_config`, `attn_implementation` apply). Without
        `vision` the config's fusion becomes `none`.

        Raises UnsupportedModelError for a family that cannot be adapted and ConfigError for
        a setting that the base cannot carry.
        """
        if isinstance(language_model, str):
            language_model = load_language_model(
                language_model,
                dtype=dtype,
                device_map=device_map,
                quantization_config=quantization_config,
                attn_implementation=attn_implementation,
            )
        if isinstance(vision, str):
            vision = load_vision(vision, device=language_model.device)
        if config is None:
            config = LlamaAdapterConfig()
        semantics = config.adapter_config
        if vision is None and semantics.sees:
            semantics = AdapterConfig.from_dict({**semantics.to_dict(), "fusion": "none"})
        config = LlamaAdapterConfig(
            adapter=semantics,
            base=describe_model(language_model),
            vision=None if vision is None else describe_model(vision),
        )
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        with _seeded(seed):
            return cls(config, language_model=language_model, vision=vision, generator=generator)

    def _new_adapter(
        self, semantics: AdapterConfig, *, generator: torch.Generator | None = None
    ) -> Adapter:
        size = None
        if semantics.sees and self.vision is not None:
            size = vision_feature_size(self.vision, semantics)
        return Adapter(self.language_model, semantics, feature_size=size, generator=generator)

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
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, vocab], and the loss if `labels` [B, T] are given.

        Pictures come as `pixel_values` [I, 3, H, W] (or [I, F, 3, H, W] for frames), as
        `visual_features` [I, P, C] of the tower, or as `visual_prompts` of `encode_visual`.
        `image_index` says which picture each row [B] or token [B, T] reads, -1 for none
        (default: row i reads picture i); `visual_mask` [B, T] which tokens read at all.
        The loss is cross-entropy over answer tokens (labels other than -100, shifted here),
        divided by `num_answer_tokens` (default: those of this batch). With labels and
        `logits_to_keep` left at 0, all logits are returned; with places [B, T] (bool) those
        of the N true ones, as [1, N, vocab]; the last layer then works there alone where it can,
        unless hidden states or attentions are asked for. `cache` is the name of `past_key_values`
        since 5.24.
        """
        self.adapter.check_route()
        known = past_key_values if cache is None else cache
        if known is not None:
            kwargs[CACHE] = known
        if visual_prompts is None and (pixel_values is not None or visual_features is not None):
            visual_prompts = self.encode_visual(pixel_values, visual_features=visual_features)
        if visual_prompts is not None:
            rows = input_ids if input_ids is not None else inputs_embeds
            num_rows = 0 if rows is None else rows.shape[0]
            visual_prompts = self._read(visual_prompts, num_rows, image_index, visual_mask, known)
        if visual_prompts is not None:
            kwargs["visual_prompts"] = visual_prompts
        scored = 0 if labels is None else logits_to_keep
        head = self.get_output_embeddings()
        with logits_at(head, logits_to_keep), last_layer_at(self.language_model, scored, kwargs):
            output = self.language_model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                logits_to_keep=0 if is_places(logits_to_keep) else logits_to_keep,
                **kwargs,
            )
        if labels is not None:
            output.loss = answer_loss(
                output.logits, labels, num_answer_tokens=num_answer_tokens, kept=logits_to_keep
            )
        return output

    def _read(
        self,
        visual: VisualPrompts,
        num_rows: int,
        image_index: Tensor | None,
        visual_mask: Tensor | None,
        known: Any,
    ) -> VisualPrompts:
        """The prompts with what reads them; ConfigError where that would be a guess."""
        num_pictures = len(visual.prompts_IMd)
        if image_index is None and num_pictures != num_rows:
            raise ConfigError(
                f"{num_pictures} pictures for {num_rows} rows: image_index must say which row "
                "reads which"
            )
        if visual_mask is None and self.adapter_config.visual_scope == "slots":
            raise ConfigError("visual_scope is 'slots': visual_mask must say which tokens are")
        if self.adapter_config.slot_reads == "own" and begins_among_slots(known, visual_mask):
            raise ConfigError(
                "slot_reads is 'own': a pass must not begin with a slot behind cached tokens: "
                "slots are counted from the first; give all slots of a picture in one pass"
            )
        packed = image_index is not None and image_index.ndim == 2
        return visual.reading(
            row_B=None if packed else image_index,
            token_BT=image_index if packed else None,
            mask_BT=visual_mask,
        )

    def encode_visual(
        self,
        pixel_values: Tensor | None = None,
        *,
        visual_features: Tensor | None = None,
        cache: bool = False,
    ) -> VisualPrompts | None:
        """Visual prompts of pictures; None if the active adapter reads none.

        `cache` also makes the keys and gated values of every layer that reads them alone, for
        many forward passes with the same numbers: for inference only.
        Raises ConfigError if there is no vision tower to read pixels with.
        """
        if self.visual is None:
            return None
        if visual_features is None:
            if self.vision is None:
                raise ConfigError("pictures were given, but this model has no vision tower")
            assert pixel_values is not None
            visual_features = vision_features(
                self.vision, pixel_values.to(self.vision.device), self.adapter_config
            )
        prompts_IMd = self.visual(visual_features)
        prompts_IMd = prompts_IMd.to(self.language_model.get_input_embeddings().weight.device)
        own_slots = self.adapter_config.slot_reads == "own"
        visual = VisualPrompts(prompts_IMd=prompts_IMd, own_slots=own_slots)
        return self._with_keys(visual) if cache else visual

    @torch.no_grad()
    def _with_keys(self, visual: VisualPrompts) -> VisualPrompts:
        late = self.adapter_config.fusion == "late"
        # an explicit reading makes late fusion keep its entry for rows without a picture
        source = visual.reading(
            row_B=torch.arange(len(visual.prompts_IMd)) if late else None,
            token_BT=None,
            mask_BT=None,
        )
        keys_values = {}
        for attention, adaption in self._adapters[self.active_adapter].prompts():
            if adaption.visual:
                entries = adaption.entries_EMd(source)
                assert entries is not None
                keys_values[adaption.layer_index] = adaption.keys_values(attention, entries)
        return replace(visual, keys_values=keys_values)

    # --- parameters -------------------------------------------------------------------------

    @property
    def adapter_config(self) -> AdapterConfig:
        """Semantics of the active adapter."""
        return self._adapters[self.active_adapter].config

    @property
    def adapter(self) -> Adapter:
        """The active adapter's modules."""
        return self._adapters[self.active_adapter]

    def group_parameters(self, group: Group | str) -> list[nn.Parameter]:
        """Trainable parameters of one of the two disjoint groups, `vision` or `language`."""
        return [p for _, p in self.adapter.named_parameters(Group(group))]

    def prepare_for_inference(self) -> None:
        """Fold bias and scale into plain linears and keep keys and values of static prompts.

        Same logits to rounding, at the base model's speed; needs memory for a second copy of the
        adapted weights. Undone by `prepare_for_training`; until then nothing learns. Quantised
        linears stay unfolded.
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

    def set_adapter(self, name: str) -> None:
        """Make a loaded adapter the active one; ConfigError if there is none of that name."""
        if name not in self._adapters:
            raise ConfigError(f"no adapter {name!r}; loaded: {', '.join(sorted(self._adapters))}")
        self.disable_adapters()
        self.active_adapter = name
        self.enable_adapters()

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
        if self.vision is not None:
            self.vision.eval()  # the tower is frozen, dropout included
        return self

    def _apply(
        self, fn: Callable[[Tensor], Tensor], recurse: bool = True
    ) -> LlamaAdapterForConditionalGeneration:
        super()._apply(fn, recurse)
        # `to`, `cuda` and the like reach adapters that are off, and modules that are folded away
        for adapter in self._adapters.values():
            for _, module in adapter.modules():
                module._apply(fn, recurse)
        return self

    # --- what transformers asks of a model --------------------------------------------------

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def get_decoder(self) -> nn.Module:
        return self.language_model.get_decoder()

    def set_attn_implementation(
        self, attn_implementation: str | dict[str, str], *_args: Any, **_kwargs: Any
    ) -> None:
        """Another attention for the base, with the adapter's prompts in it."""
        if not isinstance(attn_implementation, str):
            raise UnsupportedModelError("an adapted model takes the name of one attention")
        self.adapter.set_attn_implementation(attn_implementation)

    def gradient_checkpointing_enable(self, **_kwargs: Any) -> None:
        """Recompute activations in the backward pass, always non-reentrant."""
        self._checkpointing("enable")({"use_reentrant": False})

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
        return self.language_model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.language_model.dtype


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Modules that draw their weights from the global generator draw them from `seed`."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
