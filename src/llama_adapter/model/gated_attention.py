"""Zero-initialized gated prompt attention (LLaMA-Adapter §3, V2 §3).

Every attention module that carries prompts gets a child module, `adaption`. The functions of
`attention_registry` run the base's own attention unchanged and add

    gate(g) · softmax(q k_Pᵀ / √D) v_P

where k_P, v_P are the module's own projections of the prompts, not rotated.

Shapes: B batch, T tokens, H query heads, G key/value heads, D head size, M prompts,
I images, E prompt entries (images, or images and a fallback), K keys of all, d hidden size.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from llama_adapter.families.discovery import FoundAttention
from llama_adapter.families.offloading import execution_device
from llama_adapter.families.structure import Attention, KeysValues
from llama_adapter.model.fast.attention import attention as attend
from llama_adapter.model.groups import AdapterModule, Group, Role
from llama_adapter.model.routing import Routing, VisualPrompts


class GatedPrompt(AdapterModule):
    """What one attention module attends to besides its keys, with one gate per head, 0 at first."""

    tensors: ClassVar = {"gate": ("gate", Role.GATE), "gate_scale": ("gate_scale", Role.GATE)}
    reads_images: ClassVar[bool] = False
    has_fallback: ClassVar[bool] = False
    """Whether tokens without an image have something to attend to as well."""

    def __init__(
        self,
        found: FoundAttention,
        *,
        gate: str,
        gate_scale: bool,
    ) -> None:
        super().__init__()
        self.layer_index = found.layer_index
        self.num_heads = found.num_heads
        self.project = found.projection
        self.gate_kind = gate
        device = execution_device(found.module)
        self.gate = nn.Parameter(torch.zeros(self.num_heads, device=device))
        self.gate_scale = nn.Parameter(torch.ones(1, device=device)) if gate_scale else None

    def gate_values_H(self) -> Tensor:
        """What multiplies each head's prompt attention; exactly 0 in a new adapter."""
        gate_H = self.gate.tanh() if self.gate_kind == "tanh" else self.gate
        return gate_H if self.gate_scale is None else gate_H * self.gate_scale

    def keys_values(self, attention: Attention, entries_EMd: Tensor) -> KeysValues:
        """Keys and gated values [E, H, M, D], float dtype of the module's projections.

        The gate multiplies the values (M of them) rather than the attention output (T of them).
        """
        keys_EGMD, values_EGMD = self.project(attention, entries_EMd)
        repeat = self.num_heads // keys_EGMD.shape[1]
        if repeat > 1:
            keys_EGMD = keys_EGMD.repeat_interleave(repeat, dim=1)
            values_EGMD = values_EGMD.repeat_interleave(repeat, dim=1)
        # in float32 and rounded once
        gate_H11 = self.gate_values_H().view(-1, 1, 1)
        return keys_EGMD, (values_EGMD * gate_H11).to(values_EGMD.dtype)

    def image_entries_EMd(self, visual: VisualPrompts, *, fallback: bool) -> Tensor:
        """What images give to attend to, one entry each, in a module that reads them.

        With `fallback` a last one follows for tokens without an image, where they have one.
        """
        raise NotImplementedError

    def image_keys_values(
        self, attention: Attention, visual: VisualPrompts, query_BHTD: Tensor
    ) -> KeysValues:
        """Keys and gated values of images, made again unless a generation keeps them."""
        if visual.cache and self.layer_index in visual.cache:
            return _alike(visual.cache[self.layer_index], query_BHTD)
        entries_EMd = self.image_entries_EMd(visual, fallback=visual.routing is not None)
        entries_EMd = entries_EMd.to(query_BHTD)
        return _alike(self.keys_values(attention, entries_EMd), query_BHTD)

    def attend_to_images(
        self,
        attention: Attention,
        query_BHTD: Tensor,
        visual: VisualPrompts,
        *,
        scaling: float,
        softcap: float | None,
    ) -> Tensor:
        """What the prompts of images add, [B, T, H, D]."""
        added_BHTD = attend_to_images(
            query_BHTD,
            *self.image_keys_values(attention, visual, query_BHTD),
            visual.routing,
            scale=scaling,
            softcap=softcap,
            has_fallback=self.has_fallback,
        )
        return added_BHTD.transpose(1, 2)

    def forward(
        self,
        attention: Attention,
        query_BHTD: Tensor,
        visual: VisualPrompts | None,
        *,
        scaling: float,
        softcap: float | None,
    ) -> Tensor | None:
        """What prompt attention adds, [B, T, H, D]; None if this pass has nothing to read."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"{self.num_heads} gates"


class StaticPrompt(GatedPrompt):
    """Learned vectors that every token attends to."""

    group = Group.LANGUAGE
    tensors: ClassVar = {"prompt": ("prompt", Role.PROMPT), **GatedPrompt.tensors}
    static_keys: Tensor | None
    static_values: Tensor | None

    def __init__(
        self,
        found: FoundAttention,
        *,
        prompt_length: int,
        generator: torch.Generator | None = None,
        **gates: Any,
    ) -> None:
        super().__init__(found, **gates)
        # unit variance, like the normalized hidden states that share these projections;
        # drawn on the CPU, so that a seed gives the same values everywhere
        prompt_Md = torch.randn(prompt_length, found.width, generator=generator)
        self.prompt = nn.Parameter(prompt_Md.to(self.gate.device))
        # buffers, so that they follow the model to another device; never stored
        self.register_buffer("static_keys", None, persistent=False)
        self.register_buffer("static_values", None, persistent=False)

    @torch.no_grad()
    def cache(self, attention: Attention, *, dtype: torch.dtype) -> None:
        """Keep keys and values, for inference; `drop_cache` undoes it."""
        entry_1Md = self.prompt.unsqueeze(0).to(dtype)
        self.static_keys, self.static_values = self.keys_values(attention, entry_1Md)

    def drop_cache(self) -> None:
        """Make keys and values again in every pass, so that prompts learn."""
        self.static_keys = self.static_values = None

    def forward(
        self,
        attention: Attention,
        query_BHTD: Tensor,
        visual: VisualPrompts | None,  # noqa: ARG002
        *,
        scaling: float,
        softcap: float | None,
    ) -> Tensor | None:
        keys, values = self.static_keys, self.static_values
        if keys is None or values is None:
            keys, values = self.keys_values(attention, self.prompt.unsqueeze(0).to(query_BHTD))
        keys, values = _alike((keys, values), query_BHTD)
        return attend(query_BHTD, keys, values, scale=scaling, softcap=softcap).transpose(1, 2)

    def extra_repr(self) -> str:
        return f"{self.prompt.shape[0]} prompts, {super().extra_repr()}"


class VisualPrompt(GatedPrompt):
    """Early fusion (V2 §4.3): the prompts of images alone, which come with a pass."""

    group = Group.VISION
    tensors: ClassVar = {
        attribute: (f"visual_{name}", role)
        for attribute, (name, role) in GatedPrompt.tensors.items()
    }
    reads_images = True

    def image_entries_EMd(self, visual: VisualPrompts, *, fallback: bool) -> Tensor:  # noqa: ARG002
        return visual.prompts_IMd

    def forward(
        self,
        attention: Attention,
        query_BHTD: Tensor,
        visual: VisualPrompts | None,
        *,
        scaling: float,
        softcap: float | None,
    ) -> Tensor | None:
        if visual is None:
            return None
        return self.attend_to_images(
            attention, query_BHTD, visual, scaling=scaling, softcap=softcap
        )


class LateFusionPrompt(StaticPrompt):
    """Late fusion (V1 §3.3): the prompts of an image are added to the static ones."""

    reads_images = True
    has_fallback = True

    def image_entries_EMd(self, visual: VisualPrompts, *, fallback: bool) -> Tensor:
        """The fallback is the static prompt alone."""
        prompt_1Md = self.prompt.unsqueeze(0)
        late_IMd = prompt_1Md + visual.prompts_IMd.to(prompt_1Md)
        return torch.cat([late_IMd, prompt_1Md]) if fallback else late_IMd

    def forward(
        self,
        attention: Attention,
        query_BHTD: Tensor,
        visual: VisualPrompts | None,
        *,
        scaling: float,
        softcap: float | None,
    ) -> Tensor | None:
        if visual is None:
            return super().forward(attention, query_BHTD, None, scaling=scaling, softcap=softcap)
        return self.attend_to_images(
            attention, query_BHTD, visual, scaling=scaling, softcap=softcap
        )


def _alike(keys_values: KeysValues, query: Tensor) -> KeysValues:
    """In the query's dtype and on its device; a call that changes nothing still takes time."""
    keys, values = keys_values
    if keys.dtype == query.dtype and keys.device == query.device:
        return keys_values
    return keys.to(query), values.to(query)


def attend_to_images(
    query_BHTD: Tensor,
    keys_EHMD: Tensor,
    values_EHMD: Tensor,
    routing: Routing | None,
    *,
    scale: float,
    softcap: float | None,
    has_fallback: bool,
) -> Tensor:
    """Attention [B, H, T, D] of each token to its own image.

    A token without an image attends to the last entry where that is a fallback, else to nothing.
    """
    if routing is None:  # row i attends to image i
        batch = query_BHTD.shape[0]
        if len(keys_EHMD) > batch:
            keys_EHMD, values_EHMD = keys_EHMD[:batch], values_EHMD[:batch]
        return attend(query_BHTD, keys_EHMD, values_EHMD, scale=scale, softcap=softcap)
    image_BT = routing.image_BT.to(query_BHTD.device)
    if routing.ordinal_BT is not None:
        return _own_prompts(values_EHMD, image_BT, routing.ordinal_BT.to(query_BHTD.device))
    whole_rows = image_BT.shape[1] == 1
    row_B = image_BT[:, 0] if whole_rows else routing.row_B
    if row_B is not None and (whole_rows or not has_fallback):
        # -1 picks the last entry: the fallback, or an image whose part is zeroed below
        row_B = row_B.to(query_BHTD.device)
        keys_EHMD, values_EHMD, mask_B1TK = keys_EHMD[row_B], values_EHMD[row_B], None
    else:
        # a token without an image must attend to something too, or its softmax is 0/0
        num_entries, _, length, _ = keys_EHMD.shape
        entry_BT = image_BT.masked_fill(image_BT < 0, num_entries - 1)
        owner_K = torch.arange(num_entries, device=image_BT.device).repeat_interleave(length)
        mask_B1TK = (entry_BT[:, :, None] == owner_K).unsqueeze(1)
        keys_EHMD, values_EHMD = _side_by_side(keys_EHMD), _side_by_side(values_EHMD)
    added_BHTD = attend(
        query_BHTD, keys_EHMD, values_EHMD, mask=mask_B1TK, scale=scale, softcap=softcap
    )
    if has_fallback:
        return added_BHTD
    return added_BHTD * (image_BT >= 0)[:, None, :, None].to(added_BHTD.dtype)


def _side_by_side(x_EHMD: Tensor) -> Tensor:
    """All entries as one, [1, H, E·M, D]."""
    return x_EHMD.transpose(0, 1).flatten(1, 2).unsqueeze(0)


def _own_prompts(values_EHMD: Tensor, image_BT: Tensor, ordinal_BT: Tensor) -> Tensor:
    """Each placeholder attends to one prompt: a softmax over one key is 1, whatever the key."""
    length = values_EHMD.shape[2]
    attends_BT = (image_BT >= 0) & (ordinal_BT < length)
    own_BTHD = values_EHMD[image_BT.clamp(min=0), :, ordinal_BT.clamp(max=length - 1)]
    return (own_BTHD * attends_BT[..., None, None].to(own_BTHD.dtype)).transpose(1, 2)
