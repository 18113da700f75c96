"""Where a decoder attends, and which linears and norms matter: found by running one token.

No list of families decides anything. Attention modules are those that call transformers' registry
in that pass; a linear or norm that does not run in it, or whose output does not reach the logits
with a gradient, is given nothing to train.

Shapes: B batch, T tokens, H query heads, G key/value heads, D head size, d hidden size.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from llama_adapter.errors import UnsupportedModelError
from llama_adapter.families.offloading import execution_device
from llama_adapter.families.probing import observing, tracing_attention
from llama_adapter.families.projections import (
    ALL_SEEN,
    PROMPTS,
    PromptProjection,
    projection_of,
    relative_difference,
)
from llama_adapter.families.quantized import keep_unfused, keep_unpacked
from llama_adapter.families.structure import (
    CACHE,
    Attention,
    attention_modules,
    decoder_linears,
    decoder_norms,
    decoder_of,
    family_of,
    is_linear,
    linear_sizes,
)

VISUAL = "visual_prompts"
"""The keyword by which visual prompts go through a decoder to its attention."""

TOKEN = 3
"""What the probing passes read: the embedding of a padding token, often the first, may be 0."""

CACHE_TOLERANCE = 5e-2
"""Of the largest logit: a wrong state differs by more, a half type by less."""

_ROTARY = re.compile(r"position_embed|rotary|rope|freqs|pos_emb|^cos$|^sin$")
"""Arguments of attention modules that say how to rotate."""

_WITHOUT = re.compile(r"mask|cache|past_key_value|layer_past|labels")
"""Arguments of attention modules that prompts have nothing of."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundAttention:
    """A softmax attention module that makes keys and values of its own."""

    name: str
    """In the decoder."""
    module: Attention
    layer_index: int
    num_heads: int
    width: int
    """Of the hidden states that it reads; that of its prompts."""
    projection: PromptProjection


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderStructure:
    """What an adapter can be put on."""

    attentions: list[FoundAttention]
    """In the order in which a pass runs them; K and L of the method count these."""
    reusing: list[str]
    """Attention modules that reuse the keys and values of another layer: they get no prompts."""
    linears: list[tuple[str, nn.Module]]
    norms: list[tuple[str, nn.Module]]
    masked: frozenset[str]
    """Linears that read zeros where a row is padded, as convolutions and recurrences need it:
    what is learned must leave the padding as it is."""
    takes_visual_keyword: bool
    """Whether the decoder hands keywords on to its attention."""


def discover(language_model: PreTrainedModel) -> DecoderStructure:
    """Run one token through a bare decoder whose attention is routed through ours.

    Raises UnsupportedModelError for a family without softmax attention in transformers' registry,
    or whose attention modules cannot be run on prompts.
    """
    decoder = decoder_of(language_model)
    linears, norms = list(decoder_linears(decoder)), list(decoder_norms(decoder))
    is_meta = execution_device(language_model.get_input_embeddings()).type == "meta"
    record = _Record()
    try:
        record.run(language_model, [module for _, module in (*linears, *norms)])
    except UnsupportedModelError:
        raise
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        if not is_meta:
            raise UnsupportedModelError(
                f"{family_of(language_model)} cannot be adapted: one token does not pass it "
                f"({type(error).__name__}: {error})"
            ) from error
        return _by_names(language_model, linears, norms)
    names = {id(module): name for name, module in decoder.named_modules()}
    calls = [call for call in record.calls.values() if id(call.module) in names]
    if not calls:
        raise UnsupportedModelError(
            f"{family_of(language_model)} cannot be adapted: no softmax attention of it goes "
            "through transformers' attention registry"
        )
    indices = [getattr(call.module, "layer_idx", None) for call in calls]
    if len(set(indices)) < len(calls) or not all(isinstance(index, int) for index in indices):
        indices = list(range(len(calls)))
    attentions, reusing = [], []
    for call, index in zip(calls, indices, strict=True):
        name = names[id(call.module)]
        projection = projection_of(
            cast(Attention, call.module),
            call.identity_inputs(),
            x_22d=_trial(call.width, language_model.dtype, execution_device(call.module)),
            name=f"{family_of(language_model)} cannot be adapted: {name}",
        )
        if projection is None:
            reusing.append(name)
            continue
        attentions.append(
            FoundAttention(
                name=name,
                module=cast(Attention, call.module),
                layer_index=cast(int, index),
                num_heads=call.num_heads,
                width=call.width,
                projection=projection,
            )
        )
    if not attentions:
        raise UnsupportedModelError(
            f"{family_of(language_model)} cannot be adapted: no attention module of it makes keys "
            "from hidden states alone"
        )
    mixes = not is_meta and _mixes(decoder, calls)
    if mixes:
        _check_cache(language_model)
    inside = tuple(f"{names[id(call.module)]}." for call in calls)
    others = [(name, module) for name, module in linears if not name.startswith(inside)]
    return DecoderStructure(
        attentions=attentions,
        reusing=reusing,
        linears=[(name, module) for name, module in linears if id(module) in record.reached],
        norms=[(name, module) for name, module in norms if id(module) in record.reached],
        masked=_masked(language_model, others) if mixes else frozenset(),
        takes_visual_keyword=all(call.got_visual for call in calls),
    )


def _mixes(decoder: nn.Module, calls: list[_Call]) -> bool:
    """Whether something other than softmax attention carries values from token to token."""
    convolves = any(isinstance(module, nn.Conv1d) for module in decoder.modules())
    config: Any = decoder.config
    return convolves or len(calls) < int(config.num_hidden_layers)


@torch.no_grad()
def _check_cache(language_model: PreTrainedModel) -> None:
    """Refuse a family whose states behind a cache are others than without, or not in the cache."""
    tokens = torch.arange(
        TOKEN, TOKEN + 4, device=execution_device(language_model.get_input_embeddings())
    )
    tokens = tokens.unsqueeze(0) % int(language_model.config.get_text_config().vocab_size)
    with tracing(language_model, training=False), torch.no_grad():
        whole = language_model(input_ids=tokens, use_cache=False).logits[:, -1]
        output = language_model(input_ids=tokens[:, :-1], use_cache=True)
        past = output.get(CACHE)
        if past is not None:
            inputs = {"input_ids": tokens[:, -1:], "use_cache": True, CACHE: past}
            found = relative_difference(language_model(**inputs).logits[:, -1], whole)
    if past is None or not found <= CACHE_TOLERANCE:
        reason = "it keeps its state in itself" if past is None else f"by {found:.2g} of their size"
        raise UnsupportedModelError(
            f"{family_of(language_model)} cannot be adapted: logits behind a cache differ from "
            f"those without ({reason})"
        )


@torch.no_grad()
def _masked(
    language_model: PreTrainedModel, linears: list[tuple[str, nn.Module]]
) -> frozenset[str]:
    """Linears whose input is 0 at a padded place of a row, and is not elsewhere."""
    device = execution_device(language_model.get_input_embeddings())
    found: set[str] = set()

    def look(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0] if args else None
            if isinstance(x, Tensor) and x.ndim == 3 and x.shape[1] == 2:
                is_masked = not bool(x[0, 0].any()) and bool(x[0, 1].any())
                (found.add if is_masked else found.discard)(name)

        return hook

    with ExitStack() as stack:
        for name, module in linears:
            stack.callback(module.register_forward_pre_hook(look(name)).remove)
        stack.enter_context(tracing(language_model, training=False))
        # two rows: families ignore the mask of a single one
        tokens = torch.full((2, 2), TOKEN, device=device)
        mask = torch.tensor([[0, 1], [1, 1]], device=device)
        language_model(input_ids=tokens, attention_mask=mask, use_cache=False)
    return frozenset(found)


def _trial(width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.linspace(-1, 1, 4 * width).view(2, 2, width).to(device, dtype)


def _by_names(
    language_model: PreTrainedModel,
    linears: list[tuple[str, nn.Module]],
    norms: list[tuple[str, nn.Module]],
) -> DecoderStructure:
    """The same without running anything, for shapes alone (the meta device)."""
    text_config: Any = language_model.config.get_text_config()
    found = [
        FoundAttention(
            name=name,
            module=module,
            layer_index=module.layer_idx,
            num_heads=int(text_config.num_attention_heads),
            width=int(text_config.hidden_size),
            projection=PromptProjection(layout=None, inputs={}),
        )
        for name, module in attention_modules(language_model)
    ]
    return DecoderStructure(
        attentions=found,
        reusing=[],
        linears=linears,
        norms=norms,
        masked=frozenset(),
        takes_visual_keyword=True,
    )


@dataclass(slots=True)
class _Call:
    """What an attention module was given and made of it."""

    module: nn.Module
    num_heads: int
    got_visual: bool
    arguments: dict[str, Any]
    """Of its forward; its hidden states come first."""

    @property
    def width(self) -> int:
        return int(next(iter(self.arguments.values())).shape[-1])

    def identity_inputs(self) -> dict[str, Any]:
        """The arguments other than hidden states as prompts have them: unrotated, without a mask.

        The token was at position 0, where cosines are the only numbers other than 0 in a rotation.
        """
        (_, hidden), *others = self.arguments.items()
        return {
            name: PROMPTS if value is hidden else _as_of_prompts(name, value)
            for name, value in others
            if name != VISUAL
        }


def _as_of_prompts(name: str, value: Any) -> Any:
    if name == "attention_mask" and isinstance(value, Tensor):
        return ALL_SEEN
    if isinstance(value, Cache) or _WITHOUT.search(name):
        return None
    return _unrotated(value) if _ROTARY.search(name) else value


def _unrotated(value: Any) -> Any:
    if isinstance(value, Tensor):
        return (value != 0).to(value.dtype)
    if isinstance(value, tuple | list):
        return type(value)(_unrotated(part) for part in value)
    if isinstance(value, dict):
        return {key: _unrotated(part) for key, part in value.items()}
    return value


@dataclass(slots=True)
class _Record:
    """One pass of one token: which modules attend, and whose outputs reach the logits."""

    calls: dict[int, _Call] = field(default_factory=dict)
    reached: set[int] = field(default_factory=set)
    _arguments: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)

    def run(self, language_model: PreTrainedModel, modules: list[nn.Module]) -> None:
        device = execution_device(language_model.get_input_embeddings())
        # what is added to a module's output; one that reaches the logits has a gradient
        marks = {id(module): torch.zeros((), requires_grad=True) for module in modules}
        with ExitStack() as stack:
            for part in decoder_of(language_model).modules():
                handle = part.register_forward_pre_hook(self._before, with_kwargs=True)
                stack.callback(handle.remove)
            for module in modules:
                mark = marks[id(module)]
                handle = module.register_forward_hook(_marking(mark))
                stack.callback(handle.remove)
            stack.enter_context(observing(self._attention))
            stack.enter_context(tracing(language_model, training=True))
            inputs = {"input_ids": torch.full((1, 1), TOKEN, device=device)}
            if device.type == "meta":  # a mask that nobody has to look into
                inputs["attention_mask"] = torch.zeros(1, 1, 1, 1, device=device)
            logits = _logits(language_model, inputs)
        learned = variables_of(logits)
        self.reached = {key for key, mark in marks.items() if id(mark) in learned}

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._arguments[id(module)] = (args, kwargs)

    def _attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,  # noqa: ARG002
        visual_prompts: object | None,
    ) -> None:
        args, kwargs = self._arguments.get(id(module), ((), {}))
        if not args and not kwargs:
            return
        self.calls[id(module)] = _Call(
            module=module,
            num_heads=query.shape[1],
            got_visual=visual_prompts is not None,
            arguments=_by_name(module, args, kwargs),
        )


def _by_name(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a module's forward by name."""
    signature = inspect.signature(type(module).forward)
    bound = signature.bind(module, *args, **kwargs).arguments
    bound.pop(next(iter(signature.parameters)))
    extra = [n for n, p in signature.parameters.items() if p.kind is p.VAR_KEYWORD and n in bound]
    for name in extra:
        bound.update(bound.pop(name))
    return dict(bound)


def _marking(mark: Tensor) -> Any:
    """A hook that adds a zero to a module's output."""

    def add(module: nn.Module, _args: Any, output: Any) -> Any:
        # a linear over groups has several last dimensions: there is no vector to scale and shift
        is_plain = not is_linear(module) or output.shape[-1] == linear_sizes(module)[1]
        if isinstance(output, Tensor) and is_plain:
            return output + mark.to(output)
        return output

    return add


def _logits(language_model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """Logits of a pass that is given visual prompts where the decoder takes such a keyword."""
    try:
        output = language_model(**inputs, use_cache=False, **{VISUAL: object()})
    except TypeError as error:
        if VISUAL not in str(error):
            raise
        output = language_model(**inputs, use_cache=False)
    return cast(Tensor, output.logits)


@contextmanager
def tracing(language_model: nn.Module, *, training: bool) -> Iterator[None]:
    """Inside, a pass records which values come from which, keeps none and draws nothing for good.

    Some families call a linear in one mode and read its weight in the other.
    """
    before = {module: module.training for module in language_model.modules()}
    for module in before:
        module.training = training
    keep_unpacked(language_model)
    keep_unfused(language_model)
    try:
        with (
            torch.random.fork_rng(devices=_accelerators(language_model)),
            tracing_attention(),
            torch.enable_grad(),
            torch.autograd.graph.saved_tensors_hooks(_nothing, _never),
        ):
            yield
    finally:
        for module, was_training in before.items():
            module.training = was_training


def _accelerators(model: nn.Module) -> set[torch.device]:
    """Where a model's dropout may draw, the CPU apart."""
    return {p.device for p in model.parameters() if p.device.type == "cuda"}


def _nothing(_saved: Tensor) -> None:
    return None


def _never(_kept: Any) -> Tensor:
    raise AssertionError("a traced pass has no backward pass")


def variables_of(result: Tensor) -> set[int]:
    """The ids of all leaf tensors that a result has a gradient for."""
    found, seen, waiting = set(), set(), [result.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None:
            found.add(id(variable))
        waiting.extend(following for following, _ in node.next_functions)
    return found
