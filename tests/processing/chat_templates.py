"""Chat templates in the manner of the most used chat models, and how each is read back.

Each is written down here from its published form, in few words. `marks` are all the texts by
which a reader tells the turns apart; `roles` says whose turn each of them opens ("" for none:
what closes a turn).
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Family:
    """One template and its reader."""

    template: str
    roles: dict[str, str]
    bos: str = "<s>"
    eos: str = "</s>"
    specials: tuple[str, ...] = ()
    """What the family's own tokenizer has as special tokens besides bos and eos."""
    preamble: str = ""
    """A default system prompt, which a system message replaces."""

    def read(self, text: str) -> list[tuple[str, str]]:
        """The turns of a rendered text: whose, and what, without white space."""
        marks = sorted(self.roles, key=len, reverse=True)
        head, *found = re.split("(" + "|".join(map(re.escape, marks)) + ")", text)
        turns = [("system", head)]
        for mark, said in zip(found[::2], found[1::2], strict=True):
            turns.append((self.roles[mark], said))
        squeezed = [(role, "".join(said.split())) for role, said in turns]
        return [(role, said) for role, said in squeezed if said]


def _turns(before: str, system: str, user: str, assistant: str, opening: str) -> str:
    return (
        f"{before}{{% for m in messages %}}{{% if m.role == 'system' %}}{system}"
        f"{{% elif m.role == 'user' %}}{user}{{% else %}}{assistant}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{opening}{{% endif %}}"
    )


def _tagged(before: str, tag: str, between: str, end: str, names: dict[str, str]) -> str:
    """Templates that put the same around every role but for its name."""
    parts = [f"{tag.format(names[r])}{between}{{{{ m.content }}}}{end}" for r in names]
    return _turns(before, *parts, f"{tag.format(names['assistant'])}{between}")


NAMES = {"system": "system", "user": "user", "assistant": "assistant"}
BOS, EOS, SAID = "{{ bos_token }}", "{{ eos_token }}", "{{ m.content }}"

FAMILIES = {
    "llama-2": Family(
        template=(
            "{% if messages[0].role == 'system' %}"
            "{% set system = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' %}"
            "{% set rest = messages[1:] %}{% else %}{% set system = '' %}"
            "{% set rest = messages %}{% endif %}{% for m in rest %}{% if m.role == 'user' %}"
            "{{ bos_token + '[INST] ' + (system if loop.first else '') + m.content + ' [/INST]' }}"
            "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
        ),
        roles={
            "<s>": "",
            "[INST]": "user",
            "<<SYS>>": "system",
            "<</SYS>>": "user",
            "[/INST]": "assistant",
            "</s>": "",
        },
    ),
    "llama-3": Family(
        template=_tagged(
            BOS, "<|start_header_id|>{}<|end_header_id|>", "\n\n", "<|eot_id|>", NAMES
        ),
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        specials=("<|start_header_id|>", "<|end_header_id|>"),
        roles={
            "<|begin_of_text|>": "",
            **{f"<|start_header_id|>{r}<|end_header_id|>\n\n": r for r in NAMES},
            "<|eot_id|>": "",
            "<|start_header_id|>": "",
            "<|end_header_id|>": "",
        },
    ),
    "chatml": Family(
        template=_tagged("", "<|im_start|>{}", "\n", "<|im_end|>\n", NAMES),
        eos="<|im_end|>",
        specials=("<|im_start|>",),
        roles={
            **{f"<|im_start|>{r}\n": r for r in NAMES},
            "<|im_end|>": "",
            "<|im_start|>": "",
        },
    ),
    "mistral-v1": Family(
        template=_turns(
            BOS, "{{ raise_exception('no system') }}", f"[INST] {SAID} [/INST]", SAID + EOS, ""
        ),
        roles={"<s>": "", "[INST]": "user", "[/INST]": "assistant", "</s>": ""},
    ),
    "mistral-v3": Family(
        template=_turns(
            BOS, "{{ raise_exception('no system') }}", f"[INST] {SAID}[/INST]", f" {SAID}{EOS}", ""
        ),
        specials=("[INST]", "[/INST]"),
        roles={"<s>": "", "[INST]": "user", "[/INST]": "assistant", "</s>": ""},
    ),
    "vicuna": Family(
        template=(
            "{% if messages[0].role == 'system' %}{{ messages[0].content }}"
            "{% set rest = messages[1:] %}{% else %}{{ 'A chat between a curious user and an AI "
            "assistant. The assistant answers politely.' }}{% set rest = messages %}{% endif %}"
            "{% for m in rest %}{% if m.role == 'user' %}{{ ' USER: ' + m.content }}{% else %}"
            "{{ ' ASSISTANT: ' + m.content + eos_token }}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
        ),
        preamble=(
            "A chat between a curious user and an AI assistant. The assistant answers politely."
        ),
        roles={"USER:": "user", "ASSISTANT:": "assistant", "</s>": ""},
    ),
    "zephyr": Family(
        template=_tagged("", "<|{}|>", "\n", EOS + "\n", NAMES),
        roles={**{f"<|{r}|>\n": r for r in NAMES}, **{f"<|{r}|>": "" for r in NAMES}, "</s>": ""},
    ),
    "gemma": Family(
        template=_turns(
            BOS,
            "{{ raise_exception('System role not supported') }}",
            f"<start_of_turn>user\n{SAID}<end_of_turn>\n",
            f"<start_of_turn>model\n{SAID}<end_of_turn>\n",
            "<start_of_turn>model\n",
        ),
        bos="<bos>",
        eos="<end_of_turn>",
        specials=("<start_of_turn>",),
        roles={
            "<bos>": "",
            "<start_of_turn>user\n": "user",
            "<start_of_turn>model\n": "assistant",
            "<start_of_turn>": "",
            "<end_of_turn>": "",
        },
    ),
    "phi-3": Family(
        template=_tagged("", "<|{}|>", "\n", "<|end|>\n", NAMES),
        eos="<|end|>",
        specials=tuple(f"<|{r}|>" for r in NAMES),
        roles={
            **{f"<|{r}|>\n": r for r in NAMES},
            **{f"<|{r}|>": "" for r in NAMES},
            "<|end|>": "",
        },
    ),
    "falcon": Family(
        template=(
            "{% for m in messages %}{% if not loop.first %}{{ '\\n' }}{% endif %}"
            "{{ {'system': 'System', 'user': 'User', 'assistant': 'Falcon'}[m.role] + ': ' }}"
            "{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}{{ '\\nFalcon:' }}{% endif %}"
        ),
        eos="<|endoftext|>",
        roles={"System:": "system", "User:": "user", "Falcon:": "assistant", "<|endoftext|>": ""},
    ),
    "alpaca": Family(
        template=(
            "{% if messages[0].role == 'system' %}{{ messages[0].content }}"
            "{% set rest = messages[1:] %}{% else %}"
            "{{ 'Below is an instruction that describes a task.' }}"
            "{% set rest = messages %}{% endif %}{% for m in rest %}{% if m.role == 'user' %}"
            "{{ '\\n\\n### Instruction:\\n' + m.content }}{% else %}"
            "{{ '\\n\\n### Response:\\n' + m.content + eos_token }}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}{{ '\\n\\n### Response:\\n' }}{% endif %}"
        ),
        preamble="Below is an instruction that describes a task.",
        roles={"### Instruction:": "user", "### Response:": "assistant", "</s>": ""},
    ),
    "deepseek": Family(
        template=_turns(
            BOS, SAID, f"<｜User｜>{SAID}", f"<｜Assistant｜>{SAID}{EOS}", "<｜Assistant｜>"
        ),
        bos="<｜begin▁of▁sentence｜>",
        eos="<｜end▁of▁sentence｜>",
        specials=("<｜User｜>", "<｜Assistant｜>"),
        roles={
            "<｜begin▁of▁sentence｜>": "system",
            "<｜User｜>": "user",
            "<｜Assistant｜>": "assistant",
            "<｜end▁of▁sentence｜>": "",
        },
    ),
    "command-r": Family(
        template=_tagged(
            BOS,
            "<|START_OF_TURN_TOKEN|><|{}_TOKEN|>",
            "",
            "<|END_OF_TURN_TOKEN|>",
            {"system": "SYSTEM", "user": "USER", "assistant": "CHATBOT"},
        ),
        bos="<BOS_TOKEN>",
        eos="<|END_OF_TURN_TOKEN|>",
        specials=(
            "<|START_OF_TURN_TOKEN|>",
            "<|SYSTEM_TOKEN|>",
            "<|USER_TOKEN|>",
            "<|CHATBOT_TOKEN|>",
        ),
        roles={
            "<BOS_TOKEN>": "",
            "<|START_OF_TURN_TOKEN|>": "",
            "<|SYSTEM_TOKEN|>": "system",
            "<|USER_TOKEN|>": "user",
            "<|CHATBOT_TOKEN|>": "assistant",
            "<|END_OF_TURN_TOKEN|>": "",
        },
    ),
    "openchat": Family(
        template=_turns(
            BOS,
            f"{SAID}<|end_of_turn|>",
            f"GPT4 Correct User: {SAID}<|end_of_turn|>",
            f"GPT4 Correct Assistant: {SAID}<|end_of_turn|>",
            "GPT4 Correct Assistant:",
        ),
        eos="<|end_of_turn|>",
        roles={
            "<s>": "system",
            "GPT4 Correct User:": "user",
            "GPT4 Correct Assistant:": "assistant",
            "<|end_of_turn|>": "",
        },
    ),
    "guanaco": Family(
        template=_turns(
            "",
            f"{SAID}\n",
            f"### Human: {SAID}\n",
            f"### Assistant: {SAID}{EOS}\n",
            "### Assistant:",
        ),
        roles={"### Human:": "user", "### Assistant:": "assistant", "</s>": ""},
    ),
}
