"""Chat templates render as transformers renders them, and end whatever they hold."""

from __future__ import annotations

from typing import Any

import jinja2
import pytest
from tests.fuzzing import time_limit
from tests.processing.chat_templates import FAMILIES

from llama_adapter.errors import ConfigError
from llama_adapter.processing.jinja import compile_template

MESSAGES = [
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "Me."},
    {"role": "user", "content": "And?"},
]
DOUBLING = "{% set ns = namespace(s='aa') %}{% for i in range(60) %}"
GENERAL = """\
{%- for m in messages if m.role != 'x' recursive %}
  {{- loop.index ~ loop.length ~ (' last' if loop.last) }} {{ m.content | trim | upper }}
  {%- generation %} {{ m['content'][::-1] }}{% endgeneration %}
  {%- if 'h' in m.content %}{% continue %}{% endif %} no h
{% endfor %}
{%- macro twice(x, n=2) %}{{ x * n }}{% endmacro %}
{%- set ns = namespace(a=1) %}{% set ns.a = ns.a + 1 %}{{ twice('ab', n=ns.a) }}
{{ messages | map(attribute='role') | join(',') }} {{ '%03d' % 7 }} {{ '{:>4}'.format(5) }}
{{ {'a': messages | length} | tojson }} {{ range(3) | list }} {{ messages | selectattr('role')
 | list | length }} {{ strftime_now('%%') }} {{ 'a,b'.split(',') }}"""


@pytest.mark.parametrize("source", [GENERAL, *(f.template for f in FAMILIES.values())])
@pytest.mark.parametrize("opens", [False, True])
def test_it_renders_as_transformers_does(source: str, opens: bool, spaces_tokenizer: Any) -> None:
    expected = spaces_tokenizer.apply_chat_template(
        MESSAGES, chat_template=source, tokenize=False, add_generation_prompt=opens
    )
    text = compile_template(source).render(
        messages=MESSAGES, add_generation_prompt=opens, **spaces_tokenizer.special_tokens_map
    )
    assert text == expected


@pytest.mark.parametrize("source", [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% set l = range(9999) | list %}{% for a in l %}{% for b in l %}{% endfor %}{% endfor %}",
    "{% set l = range(9999) | list %}{% for a in l %}{{ 'x' in l }}{{ l[::-1] }}{% endfor %}",
    "{% macro f(n) %}{{ f(n - 1) ~ f(n - 1) }}{% endmacro %}{{ f(5) }}",
    "{{ 'a' * 10 ** 10 }}",
    "{{ 2 ** 9 ** 9 ** 9 }}",
    "{% set x = 99999 %}{{ 'a' * x * x }}",
    "{{ '%9999999999d' % 1 }}",
    "{{ '{:>9999999999}'.format(1) }}",
    "{{ ('{:>' ~ '9' * 10 ~ '}').format(1) }}",
    "{{ 'a'.center(9999999999) }}",
    "{{ 'a' | center(9999999999) }}",
    "{{ 'a'.ljust(1000000) * 1000000 }}",
    "{{ range(10 ** 18) }}",
    DOUBLING + "{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    DOUBLING + "{% set ns.s = ns.s + ns.s %}{% endfor %}",
    DOUBLING + "{% set ns.s = ns.s | replace('a', 'aa') %}{% endfor %}",
    DOUBLING + "{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}{% endfor %}",
    DOUBLING + "{% set ns.s = [ns.s | string ~ ns.s | string] %}{% endfor %}",
    DOUBLING + "{% set ns.s = (ns.s, ns.s) | join %}{% endfor %}",
])  # fmt: skip
def test_a_template_without_end_is_refused(source: str) -> None:
    with time_limit(20, source), pytest.raises(ConfigError, match="does not end within bounds"):
        compile_template(source).render(messages=MESSAGES)


@pytest.mark.parametrize("source", [
    "{% for m in", "{{ 1 / 0 }}", "{{ messages + 1 }}", "{{ " + "(" * 5000, "x" * 300_000,
    "{{ [].append(1) }}", "{% include 'x' %}", "{{ messages | nothing }}",
])  # fmt: skip
def test_a_damaged_template_is_refused_in_one_line(source: str) -> None:
    with pytest.raises((ConfigError, jinja2.TemplateError)) as refused:
        compile_template(source).render(messages=MESSAGES)
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize("source", [
    "{{ ''.__class__.__mro__ }}", "{{ messages.__init__.__globals__ }}", "{{ cycler.__init__ }}",
    "{{ (1).__class__ }}",
])  # fmt: skip
def test_nothing_beyond_the_arguments_is_reached(source: str) -> None:
    try:
        text = compile_template(source).render(messages=MESSAGES)
    except jinja2.TemplateError:
        return
    assert text == ""
