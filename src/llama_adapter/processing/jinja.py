"""Chat templates of tokenizers, rendered in transformers' sandbox and within bounds.

A template comes with a file that anybody may have written. The sandbox keeps it from reaching
beyond its arguments; it does not keep it from looping for ever or filling the memory. Here every
loop, call, filter and operator is charged to an account that is far larger than what any chat
template needs and far smaller than what hurts: no clock is read, so that a template is refused
everywhere or nowhere.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, wraps
from typing import Any

import jinja2
from jinja2 import meta, nodes
from transformers.utils.chat_template_utils import _compile_jinja_template

from llama_adapter.errors import ConfigError
from llama_adapter.pretrained import explain

MAX_SOURCE = 1 << 18
"""Characters of a template; the longest in use have about 20,000."""
MAX_STEPS = 1 << 20
"""What one rendering may cost: a step for each call and each item, and for 64 characters made."""
MAX_NUMBER = 1 << 20
"""Integers beyond it are lengths or widths of something that is not a chat."""


@lru_cache(maxsize=32)
def compile_template(source: str) -> BoundedTemplate:
    """The template, ready to render; ConfigError where it is not one."""
    return BoundedTemplate(source)


class BoundedTemplate:
    """A chat template that ends: ConfigError where it costs too much or fails.

    What it refuses by itself, with `raise_exception`, is a `jinja2.TemplateError`.
    """

    def __init__(self, source: str) -> None:
        if len(source) > MAX_SOURCE:
            raise ConfigError(
                f"the chat template has {len(source)} characters, at most {MAX_SOURCE} are read"
            )
        self._lock = threading.Lock()
        self._left = MAX_STEPS
        # an empty template, for its environment: the sandbox with all that chat templates call
        self._environment: Any = _compile_jinja_template("").environment.overlay()
        self._bind()
        try:
            tree = self._environment.parse(source)
            self.variables: frozenset[str] = frozenset(meta.find_undeclared_variables(tree))
            """What it reads and does not set: its switches, among others."""
            self._charge_loops(tree)
            code = self._environment.compile(tree)
            self._template = jinja2.Template.from_code(
                self._environment, code, self._environment.make_globals(None)
            )
        except Exception as error:  # a template of others fails in whatever way it likes
            raise ConfigError(f"the chat template is damaged: {explain(error)}") from error
        joins = dict.fromkeys(("str_join", "markup_join"), self._join)
        self._template.root_render_func.__globals__.update(joins)

    def render(self, **variables: Any) -> str:
        """The text; `jinja2.TemplateError` where the template refuses its arguments."""
        with self._lock:
            self._left = MAX_STEPS
            try:
                return str(self._template.render(**variables))
            except (_CostError, MemoryError, RecursionError) as error:
                raise ConfigError("the chat template does not end within bounds") from error
            except jinja2.TemplateError:
                raise
            except Exception as error:
                raise ConfigError(f"the chat template fails: {explain(error)}") from error

    def _bind(self) -> None:
        environment = self._environment
        plain_call, plain_operator = environment.call, environment.call_binop
        plain_format = environment.wrap_str_format

        def call(context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
            self._inspect(getattr(function, "__self__", None), *args, *kwargs.values())
            return self._made(plain_call(context, function, *args, **kwargs))

        def operator(context: Any, sign: str, left: Any, right: Any) -> Any:
            self._inspect(left, right)
            if sign == "**":
                raise _CostError
            if sign == "*":
                length = max(_size(left), _size(right)) + 1
                times = max(value for value in (left, right, 0) if isinstance(value, int))
                self._charge(length * times)
            return self._made(plain_operator(context, sign, left, right))

        def format_of(function: Any) -> Any:
            # the sandbox has a `str.format` of its own, in whose place it puts this
            if isinstance(getattr(function, "__self__", None), str):
                self._inspect(function.__self__)
            return plain_format(function)

        environment.call, environment.call_binop = call, operator
        environment.wrap_str_format = format_of
        environment.intercepted_binops = frozenset(environment.default_binop_table)
        environment.concat = self._join
        environment.filters = {
            name: self._metered(function) for name, function in environment.filters.items()
        }
        environment.filters[_COUNTED] = self._counted
        environment.globals = {**environment.globals}
        del environment.globals["lipsum"]

    def _charge_loops(self, tree: nodes.Template) -> None:
        """Have every loop, slice and search charged with the length of what it goes through."""
        for loop in tree.find_all(nodes.For):
            loop.iter = _counted_node(loop.iter)
        for operand in tree.find_all(nodes.Operand):
            operand.expr = _counted_node(operand.expr)
        for item in tree.find_all(nodes.Getitem):
            if isinstance(item.arg, nodes.Slice):
                item.node = _counted_node(item.node)

    def _metered(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def metered(*args: Any, **kwargs: Any) -> Any:
            self._inspect(*args, *kwargs.values())
            return self._made(function(*args, **kwargs))

        return metered

    def _counted(self, value: Any) -> Any:
        if isinstance(value, Iterator):
            return self._one_by_one(value)
        self._charge(1 + (len(value) if isinstance(value, str) else _size(value)))
        return value

    def _one_by_one(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self._charge(1)
            yield value

    def _join(self, parts: Iterable[Any]) -> str:
        texts: list[str] = []
        for part in parts:
            texts.append(str(part))
            self._charge(1 + _size(texts[-1]))
        return "".join(texts)

    def _inspect(self, *values: Any) -> None:
        for value in values:
            if isinstance(value, int) and abs(value) > MAX_NUMBER:
                raise _CostError
            if isinstance(value, str) and _WIDTH.search(value):
                raise _CostError
            self._charge(1 + _size(value))

    def _made(self, value: Any) -> Any:
        self._charge(_size(value))
        return value

    def _charge(self, steps: int) -> None:
        self._left -= steps
        if self._left < 0:
            raise _CostError


class _CostError(Exception):
    """The account is empty."""


_COUNTED = "llama_adapter_counted"
_PER_STEP = 64
# a width of millions in a format
_WIDTH = re.compile(r"[%{:][^\s%{}]{0,8}\d{7}")


def _size(value: Any) -> int:
    """Steps that going through a value costs."""
    if isinstance(value, str):
        return len(value) // _PER_STEP
    try:
        return len(value)
    except TypeError:  # jinja's context says that it is a mapping, and has no length
        return 0


def _counted_node(node: Any) -> nodes.Expr:
    return nodes.Filter(node, _COUNTED, [], [], None, None, lineno=node.lineno)
