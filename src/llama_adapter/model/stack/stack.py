"""The adapters of one base, on together: which of them each row of a pass uses is said per pass.

Shapes: I images, M prompts of each, d hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llama_adapter.config import AdapterConfig, did_you_mean
from llama_adapter.errors import ConfigError, UnsupportedModelError
from llama_adapter.families.offloading import execution_device
from llama_adapter.families.structure import Attention, KeysValues
from llama_adapter.families.vision import vision_features
from llama_adapter.model.adapter import Adapter
from llama_adapter.model.attention_registry import PREFIX, register_attention
from llama_adapter.model.gated_attention import GatedPrompt, StaticPrompt
from llama_adapter.model.routing import VisualPrompts
from llama_adapter.model.scaled_linear import LearnedNorm, ScaledLinear
from llama_adapter.model.stack.bank import PromptBank
from llama_adapter.model.stack.reads import Entries, RowReads, Selection
from llama_adapter.model.stack.tables import StackedLinear, StackedModule, StackedNorm


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StackedAdapter:
    """An adapter in a stack."""

    name: str
    index: int
    """Its row of every table."""
    adapter: Adapter
    vision: Any
    """The encoder of its images; None where it reads text alone."""

    @property
    def config(self) -> AdapterConfig:
        return self.adapter.config


class StackedPrompts(nn.Module):
    """What an attention module attends to besides its keys: the entries that this pass names."""

    def __init__(self, stack: AdapterStack, layer: int) -> None:
        super().__init__()
        # in a tuple: the stack holds this module, not the other way around
        self._stack, self._layer = (stack,), layer

    def forward(
        self,
        attention: Attention,  # noqa: ARG002
        query_BHTD: Tensor,
        visual: VisualPrompts | None,  # noqa: ARG002
        *,
        scaling: float,
        softcap: float | None,
    ) -> Tensor | None:
        return self._stack[0].read(self._layer, query_BHTD, scale=scaling, softcap=softcap)


class AdapterStack:
    """Up to `capacity` adapters on one base; adding and removing one leaves the others as they are.

    `attach` and `detach` are cheap and exact, as an adapter's. A pass computes each row with the
    adapter and the images that `select` named for it. Rows of adapter 0 are the base's, bitwise.
    """

    def __init__(
        self, language_model: PreTrainedModel, *, capacity: int = 16, image_capacity: int = 64
    ) -> None:
        """Set up for one base; `image_capacity` is how many images can be ready at once."""
        self.language_model = language_model
        self.capacity = capacity
        self.is_attached = False
        device = execution_device(language_model.get_input_embeddings())
        self.selection = Selection()
        self._static = PromptBank(capacity + 1, device)
        self._images = PromptBank(image_capacity + 1, device)
        self._free_images = list(range(image_capacity, 0, -1))
        self._adapters: dict[str, StackedAdapter] = {}
        self._modules: dict[tuple[int, str], tuple[nn.Module, str, nn.Module | None, nn.Module]]
        self._modules = {}
        """Parent, attribute, what stood there, and ours, of every place that an adapter changes."""
        self._reads: list[tuple[PromptBank, Entries]] = []
        self._without_static_BT: Tensor | None = None

    # --- adapters ---------------------------------------------------------------------------

    @property
    def adapters(self) -> dict[str, StackedAdapter]:
        """The adapters by name."""
        return dict(self._adapters)

    def __getitem__(self, name: str) -> StackedAdapter:
        if name not in self._adapters:
            known = ", ".join(sorted(self._adapters)) or "none"
            raise ConfigError(
                f"no adapter {name!r}; loaded: {known}{did_you_mean(name, self._adapters)}"
            )
        return self._adapters[name]

    @torch.no_grad()
    def add(self, name: str, adapter: Adapter, vision: Any = None) -> StackedAdapter:
        """Take a detached adapter of this base, between passes.

        Raises ConfigError for a name that is taken, an adapter of another base or a full stack.
        """
        if name in self._adapters:
            raise ConfigError(f"an adapter named {name!r} is loaded already")
        if adapter.language_model is not self.language_model:
            raise ConfigError(f"adapter {name!r} is on another base than the stack's")
        if adapter.is_attached:
            raise ConfigError(f"adapter {name!r} is attached; detach it before it joins a stack")
        if len(self._adapters) >= self.capacity:
            raise ConfigError(
                f"no place for adapter {name!r}: the stack holds {self.capacity} adapters; "
                "unload one or start with a larger capacity"
            )
        taken = {stacked.index for stacked in self._adapters.values()}
        index = min(set(range(1, self.capacity + 1)) - taken)
        stacked = StackedAdapter(name=name, index=index, adapter=adapter, vision=vision)
        with self.detached():
            self._write(adapter, index)
        with self._attached(), self._using(index):
            self._static.put(index, dict(_static_prompts(adapter)))
        self._adapters[name] = stacked
        self._merge()
        return stacked

    @torch.no_grad()
    def remove(self, name: str) -> None:
        """Forget an adapter, between passes; nothing may use it or its images any more."""
        index = self[name].index
        del self._adapters[name]
        for _, _, _, module in self._modules.values():
            if isinstance(module, StackedModule):
                module.write(index, None)
        self._static.clear(index)
        try:
            self._merge()
        except RuntimeError:  # no memory for merged weights, which are speed alone
            self._unmerge()

    def _write(self, adapter: Adapter, index: int) -> None:
        """Fill an adapter's row of every table, of which some may be new."""
        values = {}
        for target in adapter.targets:
            place = (id(target.parent), target.attribute)
            values[place] = target.module
            if place not in self._modules:
                module = self._module_for(target.module)
                self._modules[place] = (target.parent, target.attribute, target.original, module)
        for place, (_, _, _, module) in self._modules.items():
            if isinstance(module, StackedModule):
                module.write(index, values.get(place))

    def _module_for(self, module: nn.Module) -> nn.Module:
        if isinstance(module, ScaledLinear):
            return StackedLinear(module.base_layer, self.selection, self.capacity)
        if isinstance(module, LearnedNorm):
            return StackedNorm(module, self.selection, self.capacity)
        if isinstance(module, GatedPrompt):
            return StackedPrompts(self, module.layer_index)
        raise UnsupportedModelError(
            f"a {type(module).__name__} cannot differ from row to row of a batch"
        )

    def _merge(self) -> None:
        """Let plain modules compute for an adapter that is alone: the base's own speed.

        Needs memory for a second copy of the adapted weights.
        """
        alone = next(iter(self._adapters.values())) if len(self._adapters) == 1 else None
        learned = {}
        if alone is not None:
            learned = {(id(s.parent), s.attribute): s.module for s in alone.adapter.targets}
        self._unmerge()
        for place, (_, _, _, module) in self._modules.items():
            if isinstance(module, StackedModule) and alone is not None:
                module.merge(alone.index, learned.get(place))

    def _unmerge(self) -> None:
        for _, _, _, module in self._modules.values():
            if isinstance(module, StackedModule):
                module.unmerge()

    # --- putting it on ----------------------------------------------------------------------

    def attach(self) -> None:
        """Put every module in its place and route attention through ours."""
        register_attention()
        current = self.language_model.config._attn_implementation.removeprefix(PREFIX)
        self.language_model.set_attn_implementation(PREFIX + current)
        for parent, attribute, _, module in self._modules.values():
            setattr(parent, attribute, module)
        self.is_attached = True

    def detach(self) -> None:
        """Take every module off; the base computes exactly what it did before."""
        for parent, attribute, original, module in self._modules.values():
            if original is not None:
                setattr(parent, attribute, original)
            elif getattr(parent, attribute, None) is module:
                delattr(parent, attribute)
        current = self.language_model.config._attn_implementation.removeprefix(PREFIX)
        self.language_model.set_attn_implementation(current)
        self.is_attached = False

    @contextmanager
    def detached(self) -> Iterator[None]:
        """The base alone within a block, on which an adapter can be made."""
        was_attached = self.is_attached
        if was_attached:
            self.detach()
        try:
            yield
        finally:
            if was_attached:
                self.attach()

    @contextmanager
    def _attached(self) -> Iterator[None]:
        was_attached = self.is_attached
        if not was_attached:
            self.attach()
        try:
            yield
        finally:
            if not was_attached:
                self.detach()

    # --- images -----------------------------------------------------------------------------

    @property
    def free_images(self) -> int:
        """How many further images can be ready at once."""
        return len(self._free_images)

    @torch.no_grad()
    def encode(self, name: str, pixel_values: Tensor) -> list[int]:
        """Make the prompts of images (I, 3, H, W) or (I, F, 3, H, W) ready for an adapter's rows.

        Returns the entry of each, 0 where the adapter reads text alone. Nothing is attached or
        detached for it; the next pass needs `select` first. Raises ConfigError where no entry is
        free.
        """
        stacked = self[name]
        projection = stacked.adapter.projection
        if projection is None or stacked.vision is None:
            return [0] * len(pixel_values)
        if len(pixel_values) > self.free_images:
            raise ConfigError(
                f"{len(pixel_values)} images, but there is place for {self.free_images} more"
            )
        vision = stacked.vision
        features = vision_features(
            vision, pixel_values.to(execution_device(vision)), stacked.config
        )
        prompts_IMd = projection(features.to(execution_device(projection)))
        prompts_IMd = prompts_IMd.to(self._images.device)
        with self._attached(), self._using(stacked.index):
            layers = dict(_image_prompts(stacked.adapter, VisualPrompts(prompts_IMd=prompts_IMd)))
        entries = [self._free_images.pop() for _ in range(len(prompts_IMd))]
        try:
            for image, entry in enumerate(entries):
                self._images.put(
                    entry, {layer: (k[image], v[image]) for layer, (k, v) in layers.items()}
                )
        except Exception:  # no memory for larger tables
            self.release(entries)
            raise
        return entries

    def release(self, entries: Sequence[int]) -> None:
        """Give back the entries of images that no row reads any more."""
        for entry in entries:
            if entry:
                self._images.clear(entry)
                self._free_images.append(entry)

    @contextmanager
    def _using(self, index: int) -> Iterator[None]:
        """An adapter's own linears and norms within a block, as prompts pass them."""
        self.selection.set([index])
        self._reads = []
        try:
            yield
        finally:
            self.selection.set([0])

    # --- passes -----------------------------------------------------------------------------

    def select(self, rows: Sequence[RowReads], *, num_tokens: int = 1) -> None:
        """Say what the rows of the next pass use and read, of so many tokens each."""
        self.selection.set([row.adapter for row in rows])
        self._without_static_BT = None
        self._reads = []
        if reads := self._static.of_rows([row.static for row in rows]):
            self._reads.append((self._static, reads))
        if reads := self._images.of_rows([row.image for row in rows]):
            self._reads.append((self._images, reads))
        if any(row.images is not None for row in rows):
            by_token = self._images.of_tokens(rows, num_tokens)
            self._reads += [(self._images, reads) for reads in by_token]
            if any(row.is_late for row in rows):
                self._without_static_BT = self._hidden_static(rows, num_tokens)

    def _hidden_static(self, rows: Sequence[RowReads], num_tokens: int) -> Tensor:
        """Where an image of late fusion takes the place of static prompts, token by token."""
        hidden = torch.zeros(len(rows), num_tokens, dtype=torch.bool, device=self._images.device)
        for place, row in enumerate(rows):
            if row.is_late and row.images is not None:
                images = torch.tensor(row.images, device=hidden.device)
                hidden[place, : len(images)] = images > 0
        return hidden

    def read(
        self, layer: int, query_BHTD: Tensor, *, scale: float, softcap: float | None
    ) -> Tensor | None:
        """What prompts add in a layer of this pass, [B, T, H, D]; None for nothing."""
        total: Tensor | None = None
        for bank, reads in self._reads:
            added = bank.read(layer, query_BHTD, reads, scale=scale, softcap=softcap)
            if added is None:
                continue
            if bank is self._static and self._without_static_BT is not None:
                hidden_BT = self._without_static_BT.to(added.device)
                added = added.masked_fill(hidden_BT[:, None, :, None], 0)
            total = added if total is None else total + added
        return None if total is None else total.transpose(1, 2)


def _static_prompts(adapter: Adapter) -> Iterator[tuple[int, KeysValues]]:
    """Keys and gated values [H, M, D] of an adapter's static prompts, by layer."""
    for attention, prompt in adapter.prompts():
        if isinstance(prompt, StaticPrompt):
            entry_1Md = prompt.prompt.detach().unsqueeze(0).to(adapter.language_model.dtype)
            keys, values = prompt.keys_values(attention, entry_1Md)
            yield prompt.layer_index, (keys[0], values[0])


def _image_prompts(adapter: Adapter, visual: VisualPrompts) -> Iterator[tuple[int, KeysValues]]:
    """Keys and gated values [I, H, M, D] of images, by layer that reads them."""
    for attention, prompt in adapter.prompts():
        if prompt.reads_images:
            entries_EMd = prompt.image_entries_EMd(visual, fallback=False)
            yield prompt.layer_index, prompt.keys_values(attention, entries_EMd)
