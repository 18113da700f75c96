"""Zero-initialised gated prompt attention (LLaMA-Adapter §3, V2 §3).

Every attention module that carries prompts gets a child module, `adaption`. The functions of
`attention_registry` run the base's own attention unchanged and add

    gate(g) · softmax(q k_Pᵀ / √D) v_P

where k_P, v_P are the module's own projections of the prompts, not rotated.

Shapes: B batch, T tokens, H query heads, G key/value heads, D head size, M prompts,
I pictures, E prompt entries (pictures, or pictures and "no picture"), d hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from llama_adapter.model.fast.attention import attention as attend
from llama_adapter.model.groups import AdapterModule, Group, Role
from llama_adapter.model.prompt_projection import Attention, KeysValues, project_prompt


@dataclass(frozen=True, kw_only=True, slots=True)
class VisualPrompts:
    """The visual prompts of one forward pass and which tokens read them.

    Exactly one of `row_B` and `token_BT` is set, unless both are None: then row i reads picture i.
    """

    prompts_IMd: Tensor
    row_B: Tensor | None = None
    """Which picture each row reads, -1 for none."""
    token_BT: Tensor | None = None
    """Which picture each token reads, -1 for none: for packed rows."""
    mask_BT: Tensor | None = None
    """Which tokens read visual prompts at all; None: every token."""
    own_slots: bool = False
    """Whether the i-th of the reading tokens in a row reads the i-th prompt alone."""
    ordinal_BT: Tensor | None = None
    """With `own_slots`: the how manieth placeholder of its image each reading token is."""
    keys_values: dict[int, KeysValues] | None = None
    """Keys and gated values per layer, made once for a whole generation."""

    @property
    def is_plain(self) -> bool:
        """Whether every token of row i reads picture i."""
        return self.row_B is None and self.token_BT is None and self.mask_BT is None

    def reading(
        self,
        *,
        row_B: Tensor | None,
        token_BT: Tensor | None,
        mask_BT: Tensor | None,
        ordinal_BT: Tensor | None = None,
    ) -> VisualPrompts:
        """The same prompts, read by other rows and tokens."""
        return replace(self, row_B=row_B, token_BT=token_BT, mask_BT=mask_BT, ordinal_BT=ordinal_BT)

    def __deepcopy__(self, memo: dict[int, Any]) -> VisualPrompts:
        return self  # never changed; transformers copies what it hands to an assistant


class GatedPrompt(AdapterModule):
    """What one attention module reads beside its keys, with one gate per head, 0 at the start."""

    tensors: ClassVar = {"gate": ("gate", Role.GATE), "gate_scale": ("gate_scale", Role.GATE)}
    reads_images: ClassVar[bool] = False

    def __init__(
        self,
        attention: Attention,
        *,
        num_heads: int,
        gate: str,
        gate_scale: bool,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.layer_index = int(attention.layer_idx)
        self.num_heads = num_heads
        self.gate_kind = gate
        self.gate = nn.Parameter(torch.zeros(num_heads, device=device))
        self.gate_scale = nn.Parameter(torch.ones(1, device=device)) if gate_scale else None

    def gate_values_H(self) -> Tensor:
        """What multiplies each head's prompt attention; exactly 0 in a new adapter."""
        gate_H = self.gate.tanh() if self.gate_kind == "tanh" else self.gate
        return gate_H if self.gate_scale is None else gate_H * self.gate_scale

    def keys_values(self, attention: Attention, entries_EMd: Tensor) -> KeysValues:
        """Keys and gated values [E, H, M, D], float dtype of the module's projections.

        The gate multiplies the values (M of them) rather than the attention output (T of them).
        """
        keys_EGMD, values_EGMD = project_prompt(attention, entries_EMd)
        repeat = self.num_heads // keys_EGMD.shape[1]
        if repeat > 1:
            keys_EGMD = keys_EGMD.repeat_interleave(repeat, dim=1)
            values_EGMD = values_EGMD.repeat_interleave(repeat, dim=1)
        # in float32 and rounded once
        gate_H11 = self.gate_values_H().view(-1, 1, 1)
        return keys_EGMD, (values_EGMD * gate_H11).to(values_EGMD.dtype)

    def image_entries_EMd(self, visual: VisualPrompts) -> Tensor:
        """What images give to attend to, one entry each, in a module that reads them."""
        raise NotImplementedError

    def image_keys_values(
        self, attention: Attention, visual: VisualPrompts, query_BHTD: Tensor
    ) -> KeysValues:
        """Keys and gated values of images, made anew unless a generation keeps them."""
        if visual.keys_values and self.layer_index in visual.keys_values:
            return _alike(visual.keys_values[self.layer_index], query_BHTD)
        entries_EMd = self.image_entries_EMd(visual).to(query_BHTD)
        return _alike(self.keys_values(attention, entries_EMd), query_BHTD)

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
        attention: Attention,
        *,
        prompt_length: int,
        hidden_size: int,
        device: torch.device,
        generator: torch.Generator | None = None,
        **gates: Any,
    ) -> None:
        super().__init__(attention, device=device, **gates)
        # unit variance, like the normalised hidden states that share these projections;
        # drawn on the CPU, so that a seed gives the same numbers everywhere
        prompt_Md = torch.randn(prompt_length, hidden_size, generator=generator)
        self.prompt = nn.Parameter(prompt_Md.to(device))
        # buffers, so that they follow the model to another device; never stored
        self.register_buffer("static_keys", None, persistent=False)
        self.register_buffer("static_values", None, persistent=False)

    @torch.no_grad()
    def cache(self, attention: Attention, *, dtype: torch.dtype) -> None:
        """Keep keys and values, for inference; `drop_cache` undoes it."""
        entry_1Md = self.prompt.unsqueeze(0).to(dtype)
        self.static_keys, self.static_values = self.keys_values(attention, entry_1Md)

    def drop_cache(self) -> None:
        """Make keys and values anew in every pass, so that prompts learn."""
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

    def image_entries_EMd(self, visual: VisualPrompts) -> Tensor:
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
        keys, values = self.image_keys_values(attention, visual, query_BHTD)
        return _attend_visual(
            query_BHTD, keys, values, visual, scaling, softcap, has_static_entry=False
        ).transpose(1, 2)


class LateFusionPrompt(StaticPrompt):
    """Late fusion (V1 §3.3): the prompts of an image are added to the static ones."""

    reads_images = True

    def image_entries_EMd(self, visual: VisualPrompts) -> Tensor:
        """One entry per image; a last one, for tokens without an image, is the static prompt."""
        prompt_1Md = self.prompt.unsqueeze(0)
        late_IMd = prompt_1Md + visual.prompts_IMd.to(prompt_1Md)
        return late_IMd if visual.is_plain else torch.cat([late_IMd, prompt_1Md])

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
        keys, values = self.image_keys_values(attention, visual, query_BHTD)
        return _attend_visual(
            query_BHTD, keys, values, visual, scaling, softcap, has_static_entry=True
        ).transpose(1, 2)


def _alike(keys_values: KeysValues, query: Tensor) -> KeysValues:
    """In the query's dtype and on its device; a call that changes nothing still takes time."""
    keys, values = keys_values
    if keys.dtype == query.dtype and keys.device == query.device:
        return keys_values
    return keys.to(query), values.to(query)


def _attend_visual(
    query_BHTD: Tensor,
    keys_EHMD: Tensor,
    values_EHMD: Tensor,
    visual: VisualPrompts,
    scaling: float,
    softcap: float | None,
    *,
    has_static_entry: bool,
) -> Tensor:
    """Attention to each row's or token's own picture; nothing where there is none.

    With a static entry (late fusion) a token without a picture reads the static prompts alone.
    """
    if visual.own_slots:
        return _read_own(query_BHTD, values_EHMD, visual)
    if visual.token_BT is not None or (has_static_entry and visual.mask_BT is not None):
        return _attend_packed(
            query_BHTD,
            keys_EHMD,
            values_EHMD,
            visual,
            scaling,
            softcap,
            has_static_entry=has_static_entry,
        )
    device = query_BHTD.device
    reads_BT = None if visual.mask_BT is None else visual.mask_BT.to(device)
    if visual.row_B is not None:
        # -1 picks the last entry: the static prompt alone, or a picture whose reading is zeroed
        row_B = visual.row_B.to(device)
        keys_EHMD, values_EHMD = keys_EHMD[row_B], values_EHMD[row_B]
        if not has_static_entry:
            sees_B1 = (row_B >= 0).unsqueeze(1)
            reads_BT = sees_B1 if reads_BT is None else sees_B1 & reads_BT
    added_BHTD = attend(query_BHTD, keys_EHMD, values_EHMD, scale=scaling, softcap=softcap)
    if reads_BT is None or has_static_entry:
        return added_BHTD
    return added_BHTD * reads_BT[:, None, :, None].to(added_BHTD.dtype)


def _read_own(query_BHTD: Tensor, values_EHMD: Tensor, visual: VisualPrompts) -> Tensor:
    """Each slot reads one prompt: a softmax over a single key is 1, whatever the key."""
    num_entries, num_heads, length, head_size = values_EHMD.shape
    reads_BT, ordinal_BT = visual.mask_BT, visual.ordinal_BT
    assert reads_BT is not None  # the model asks for the one
    assert ordinal_BT is not None  # and counts the other
    reads_BT, ordinal_BT = reads_BT.to(query_BHTD.device), ordinal_BT.to(query_BHTD.device)
    token_BT, row_B = visual.token_BT, visual.row_B
    if token_BT is not None:
        token_BT = token_BT.to(query_BHTD.device)
        reads_BT = reads_BT & (token_BT >= 0)
    elif row_B is not None:
        row_B = row_B.to(query_BHTD.device)
        reads_BT = reads_BT & (row_B >= 0).unsqueeze(1)
        values_EHMD = values_EHMD[row_B]
    prompts_M = torch.arange(length, device=query_BHTD.device)
    weights_BTM = (ordinal_BT[..., None] == prompts_M) & reads_BT[..., None]
    if token_BT is None:
        return weights_BTM.unsqueeze(1).to(values_EHMD.dtype) @ values_EHMD
    entries_E = torch.arange(num_entries, device=query_BHTD.device)
    weights_BTEM = weights_BTM[:, :, None] & (token_BT[..., None, None] == entries_E[:, None])
    values = values_EHMD.transpose(0, 1).reshape(1, num_heads, num_entries * length, head_size)
    return weights_BTEM.flatten(2).unsqueeze(1).to(values.dtype) @ values


def begins_among_slots(cache: Any, mask_BT: Tensor | None) -> bool:
    """Whether a pass begins with a slot behind cached tokens, which may be of the same run."""
    if cache is None or mask_BT is None or torch.compiler.is_compiling():
        return False
    return bool(cache.get_seq_length() > 0 and mask_BT[:, 0].any())


def places_in_runs(reads_BT: Tensor, token_BT: Tensor | None) -> Tensor:
    """How many tokens of the same run of slots stand before each, whole runs at a time.

    A run is what stands together and reads one picture, so that every picture begins anew.
    """
    if token_BT is not None:
        token_BT = token_BT.to(reads_BT.device)
        reads_BT = reads_BT & (token_BT >= 0)
    goes_on_BT = reads_BT[:, 1:] & reads_BT[:, :-1]
    if token_BT is not None:
        goes_on_BT = goes_on_BT & (token_BT[:, 1:] == token_BT[:, :-1])
    begins_BT = torch.cat([torch.ones_like(reads_BT[:, :1]), ~goes_on_BT], dim=1)
    place_T = torch.arange(reads_BT.shape[1], device=reads_BT.device)
    start_BT = (place_T * begins_BT).cummax(1).values
    return place_T - start_BT


def _attend_packed(
    query_BHTD: Tensor,
    keys_EHMD: Tensor,
    values_EHMD: Tensor,
    visual: VisualPrompts,
    scaling: float,
    softcap: float | None,
    *,
    has_static_entry: bool,
) -> Tensor:
    """The same where a row's tokens read different pictures, or some of them none."""
    num_entries, num_heads, length, head_size = keys_EHMD.shape
    token_BT = visual.token_BT
    if token_BT is None:
        row_B = visual.row_B
        if row_B is None:
            row_B = torch.arange(query_BHTD.shape[0], device=query_BHTD.device)
        token_BT = row_B.unsqueeze(1).expand(-1, query_BHTD.shape[2])
    token_BT = token_BT.to(query_BHTD.device)
    if visual.mask_BT is not None:
        token_BT = token_BT.masked_fill(~visual.mask_BT.to(token_BT.device), -1)
    # a token without a picture must still attend to something, or its softmax is 0/0
    fallback = num_entries - 1
    entry_BT = token_BT.masked_fill(token_BT < 0, fallback)
    owner_K = torch.arange(num_entries, device=token_BT.device).repeat_interleave(length)
    mask_B1TK = (entry_BT[:, :, None] == owner_K).unsqueeze(1)
    shape = (1, num_heads, num_entries * length, head_size)
    keys = keys_EHMD.transpose(0, 1).reshape(shape)
    values = values_EHMD.transpose(0, 1).reshape(shape)
    added_BHTD = attend(query_BHTD, keys, values, mask=mask_B1TK, scale=scaling, softcap=softcap)
    if has_static_entry:
        return added_BHTD
    return added_BHTD * (token_BT >= 0)[:, None, :, None].to(added_BHTD.dtype)
