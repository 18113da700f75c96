"""A processor's prompts as a Jinja chat template, for engines that render prompts themselves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from string import Formatter
from typing import Any

from llama_adapter.conversation import Conversation
from llama_adapter.errors import CheckpointError
from llama_adapter.processing.processor import LlamaAdapterProcessor
from llama_adapter.processing.templates import TEMPLATES, LineTemplate

# Contents become one text each, with their images' placeholders apart from it. Special tokens of
# the tokenizer are broken up in what users say, so that they cannot pass for an image or a turn.
_READ = """\
{%- macro said(content) -%}
{%- set found = namespace(text='') -%}
{%- if content is string -%}{%- set found.text = content -%}
{%- else -%}
{%- for part in texts_of(content) -%}
{%- set found.text = found.text + ('\\n' if not loop.first else '') + part['text'] -%}
{%- endfor -%}
{%- endif -%}
{%- for token in specials -%}
{%- set found.text = found.text | replace(token, token[:1] + ' ' + token[1:]) -%}
{%- endfor -%}
{{- found.text -}}
{%- endmacro -%}
{%- macro placeholders(content) -%}
{%- if placeholder and content is not string -%}
{%- for part in images_of(content) -%}
{{- placeholder + ('' if loop.last else ' ') -}}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
"""
_TEXTS = "(content | selectattr('type', 'equalto', 'text') | list)"
_IMAGES = "(content | rejectattr('type', 'equalto', 'text') | list)"

_LINES = """\
{%- set seen = namespace(system=none, first=true) -%}
{%- for message in messages -%}
{%- set content = message['content'] -%}
{%- if content is not string -%}{%- for part in content -%}{%- endfor -%}{%- endif -%}
{%- if message['role'] in ('system', 'developer') -%}
{%- set seen.system = said(content) -%}
{%- elif message['role'] == 'assistant' -%}
{{- respond + before_answer + said(content) + end -}}
{%- elif seen.first -%}
{%- set seen.first = false -%}
{%- set question = said(content) -%}
{%- set images = placeholders(content) -%}
{%- set told = (seen.system or '') if system_is_context else '' -%}
{%- set context = images + (after_images if images and told else '') + told -%}
{%- if context -%}
{%- set system = seen.system if seen.system is not none else system_with_context -%}
WITH_CONTEXT
{%- else -%}
{%- set system = seen.system if seen.system is not none else system_without_context -%}
WITHOUT_CONTEXT
{%- endif -%}
{%- else -%}
{%- set images = placeholders(content) -%}
{%- set question = images + (' ' if images else '') + said(content) -%}
LATER
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- respond -}}{%- endif -%}
"""

_CHAT = """\
{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- set content = message['content'] -%}
{%- if content is not string -%}{%- for part in content -%}{%- endfor -%}{%- endif -%}
{%- set images = placeholders(content) -%}
{%- set text = images + ('\\n' if images else '') + said(content) -%}
{%- set flat.messages = flat.messages + [{'role': message['role'], 'content': text}] -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
"""


def stock_template(processor: LlamaAdapterProcessor) -> str:
    """A chat template that renders what the processor renders, checked on sample conversations.

    It breaks up exact special tokens in what users say, but neither other spellings of them nor
    the headings of a template. Raises CheckpointError where the prompts would differ.
    """
    made = TEMPLATES[processor.template]
    tokenizer = processor.tokenizer
    specials = sorted({str(t) for t in tokenizer.added_tokens_decoder.values()}, key=len)
    values: dict[str, Any] = {"specials": specials[::-1], "placeholder": processor.placeholder_text}
    if isinstance(made, LineTemplate):
        values |= {
            "respond": made.respond,
            "before_answer": made.before_answer,
            "end": made.end_for(tokenizer),
            "after_images": made.after_placeholders,
            "system_is_context": made.system_with_context is None,
            "system_with_context": made.system_with_context or "",
            "system_without_context": made.system_without_context or "",
        }
        body = _LINES.replace("WITH_CONTEXT", _filled(made.with_context))
        body = body.replace("WITHOUT_CONTEXT", _filled(made.without_context))
        body = body.replace("LATER", _filled(made.later))
    else:
        chat = processor.to_dict()["chat"] or {}
        values |= chat.get("switches", {})
        body = _CHAT + str(tokenizer.chat_template)
    read = _READ.replace("texts_of(content)", _TEXTS).replace("images_of(content)", _IMAGES)
    settings = "".join(f"{{%- set {k} = {_literal(v)} -%}}\n" for k, v in values.items())
    template = settings + read + body
    begins = str(processor.render(Conversation.ask("a")))
    bos = tokenizer.bos_token
    if bos and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]:
        if not begins.startswith(bos):
            template = f"{{{{- {_literal(bos)} -}}}}\n{template}"
    else:
        bos = ""
    _check(processor, template, opening="" if begins.startswith(bos or "\0") else bos or "")
    return template


def _filled(pattern: str) -> str:
    return "{{- " + " + ".join(_pieces(pattern)) + " -}}"


def _pieces(pattern: str) -> Iterator[str]:
    for literal, field, _, _ in Formatter().parse(pattern):
        if literal:
            yield _literal(literal)
        if field is not None:
            yield field


def _literal(value: Any) -> str:
    """A value as Jinja writes it."""
    written = json.dumps(value, ensure_ascii=False)
    return {"null": "none"}.get(written, written)


def _check(processor: LlamaAdapterProcessor, template: str, *, opening: str) -> None:
    image = {"type": "image"}

    def text(said: str) -> dict[str, Any]:
        return {"type": "text", "text": said}

    plain = [{"role": "user", "content": "What is it?"}]
    answered = [*plain, {"role": "assistant", "content": "A tree."}]
    talks: list[list[dict[str, Any]]] = [
        plain,
        [{"role": "system", "content": "Be short."}, *plain],
        [*answered, {"role": "user", "content": [text("And"), text("this?")]}],
    ]
    if processor.image_processor is not None:
        talks.append([{"role": "user", "content": [image, text("What is it?")]}])
        if processor.placeholder_text:
            talks.append([*answered, {"role": "user", "content": [image, image, text("This?")]}])
    for talk in talks:
        expected = opening + str(processor.render(Conversation.from_messages(talk)))
        found = processor.tokenizer.apply_chat_template(
            talk, chat_template=template, tokenize=False, add_generation_prompt=True
        )
        if found != expected:
            raise CheckpointError(
                f"template {processor.template!r} cannot be written as a chat template: it renders "
                f"{found!r} where the adapter's prompts are {expected!r}"
            )
