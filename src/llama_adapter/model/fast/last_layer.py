"""The last layer at scored positions alone: what it makes elsewhere, nothing reads.

Keys and values are needed everywhere; queries, the output of attention and the MLP only where a
logit is. Each of these acts on a position by itself, so logits and gradients stay what they were.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llama_adapter.model.anatomy import is_linear
from llama_adapter.model.fast.switch import is_on
from llama_adapter.model.loss import is_places
from llama_adapter.model.quantised import mixes_positions

AROUND_ATTENTION = ("q_proj", "o_proj", "dense")
"""Names, in any family, of its linears that are not for keys and values too."""


@contextmanager
def last_layer_at(
    language_model: PreTrainedModel, kept: int | Tensor, asked: Mapping[str, Any]
) -> Iterator[None]:
    """Inside, parts of the last layer work where a logit is kept alone, and give 0 elsewhere.

    `kept` are positions [T'] or places [B, T]; a number of them is left to the whole layer. So is
    a pass that is `asked` for hidden states or attentions, or compiled.
    """
    whole = torch.compiler.is_compiling() or not isinstance(kept, Tensor)
    if whole or not is_on() or _shows_inside(language_model, asked):
        yield
        return
    places = functools.cache(functools.partial(_places, kept))
    calls: list[tuple[torch.Size, Tensor]] = []

    def pick(_part: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x_BTd, *others = inputs
        place_N = places(x_BTd.shape[:2], x_BTd.device)
        calls.append((x_BTd.shape[:2], place_N))
        return (x_BTd.flatten(0, 1).index_select(0, place_N).unsqueeze(0), *others)

    def put_back(_part: nn.Module, _inputs: Any, y_1Nd: Tensor) -> Tensor:
        shape, place_N = calls.pop()
        all_nd = y_1Nd.new_zeros(shape.numel(), y_1Nd.shape[-1])
        return all_nd.index_copy_(0, place_N.to(y_1Nd.device), y_1Nd[0]).unflatten(0, shape)

    with ExitStack() as hooks:
        for part in _parts(language_model):
            hooks.callback(part.register_forward_pre_hook(pick).remove)
            hooks.callback(part.register_forward_hook(put_back).remove)
        yield


def _places(kept: int | Tensor, shape: torch.Size, device: torch.device) -> Tensor:
    """Which of all B·T places are kept, in order."""
    assert isinstance(kept, Tensor)
    if is_places(kept):
        is_kept_BT = kept
    else:
        # whatever picks positions, in any order, from the end or twice
        is_kept_BT = torch.zeros(shape, dtype=torch.bool)
        is_kept_BT[:, kept.to("cpu")] = True
    return is_kept_BT.flatten().nonzero().flatten().to(device)


def _shows_inside(language_model: PreTrainedModel, asked: Mapping[str, Any]) -> bool:
    names = ("output_hidden_states", "output_attentions")
    wishes = {name: asked.get(name) for name in names}
    return any(getattr(language_model.config, n) if w is None else w for n, w in wishes.items())


def _parts(language_model: PreTrainedModel) -> list[nn.Module]:
    """Parts of the last layer that can be asked for some positions alone; empty if none can.

    Not in a mixture of experts, which counts the positions that it sees; not in a layer that is
    computed again in the backward pass, for which whoever asked is gone; nor where a compiled graph
    would keep the hooks of its first pass.
    """
    decoder = language_model.get_decoder()
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        return []
    layer = layers[-1]
    mlp = getattr(layer, "mlp", None)
    attention = getattr(layer, "self_attn", getattr(layer, "attention", None))
    if not isinstance(mlp, nn.Module) or not isinstance(attention, nn.Module):
        return []
    recomputed = any(
        getattr(module, "gradient_checkpointing", False)
        or hasattr(module, "_checkpoint_wrapped_module")
        for module in (decoder, layer, mlp, attention)
    )
    compiled = any(
        module._compiled_call_impl is not None or hasattr(module, "_orig_mod")
        for module in (language_model, decoder, layer, mlp, attention)
    )
    if recomputed or compiled or hasattr(mlp, "experts") or not _is_of_linears(mlp):
        return []
    around = [getattr(attention, name, None) for name in AROUND_ATTENTION]
    return [mlp, *(m for m in around if isinstance(m, nn.Module) and _is_of_linears(m))]


def _is_of_linears(module: nn.Module) -> bool:
    """Whether it is made of linears that take each position by itself."""
    return all(
        is_linear(part) and not mixes_positions(part)
        for part in module.modules()
        if any(True for _ in part.parameters(recurse=False))
    )
