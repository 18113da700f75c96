"""What generation reads is the beginning of what training uses; an answer's end is learnt."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.processing.chat_templates import FAMILIES
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llama_adapter import (
    CheckpointError,
    Conversation,
    LlamaAdapterConfig,
    LlamaAdapterForConditionalGeneration,
    LlamaAdapterProcessor,
    PromptError,
)
from llama_adapter.chat import ChatSession
from llama_adapter.conversation import Message
from llama_adapter.errors import ConfigError
from llama_adapter.evaluation.answering import LocalAnswerer
from llama_adapter.evaluation.tasks.base import Generation
from llama_adapter.generation import GenerationSettings

try:
    import trl

    SHIPPED = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
except ImportError:
    SHIPPED = []

# Special tokens as templates write them; a tokenizer has those of its own family.
_SPECIAL = re.compile(
    r"<[|｜][^\s<>]{1,40}?[|｜]>|<[|]?/?(?:think|turn|start_of_turn|end_of_turn)[|]?>|\[/?INST\]"
    r"|<end_of_utterance>"
)
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}"
    "<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
"""In the manner of Qwen 3: an empty block before the last answer, and a switch for prompts."""


def tokenizer_of(template: str, *, eos: str = "</s>", merges: Any = ()) -> Any:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = [*alphabet, *("".join(merge) for merge in merges)]
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(vocabulary)}, list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token=eos,
        pad_token="<pad>",
        extra_special_tokens=sorted(set(_SPECIAL.findall(template)) - {"<s>", eos}),
        chat_template=template,
    )


@cache
def shipped(path: Path) -> LlamaAdapterProcessor:
    """A processor with the template, whose preamble is one token: some have 4,000 letters."""
    tokenizer = tokenizer_of(path.read_text())
    processor = LlamaAdapterProcessor(None, tokenizer, template="chat")
    preamble = str(processor.render(Conversation.ask("\ue000"))).partition("\ue000")[0]
    tokenizer.add_tokens([text for text in _SPECIAL.split(preamble) if len(text) > 40])
    return LlamaAdapterProcessor(None, tokenizer, template="chat")


def talks() -> Iterator[Conversation]:
    for said in ("Yes.", "\nno", "  1", "\n\n", "é", "<x>"):
        talk = Conversation.ask(f"Who{said}?", answer=f"{said}a").user("\nAnd?")
        yield talk.assistant(f"b{said}").user("Why? ").assistant(said + "c")


def assert_trained_is_generated(processor: LlamaAdapterProcessor, talk: Conversation) -> None:
    whole = processor.encode(talk)
    first = len(talk.messages) - len(talk.turns)
    learnt: list[int] = []
    for count in range(first + 1, len(talk.messages), 2):
        prompt = processor.encode(Conversation(talk.messages[:count], context=talk.context))
        assert whole.input_ids[: len(prompt)] == prompt.input_ids
        # the model writes the answer and its end, from the first token after the prompt on
        answered = processor.encode(Conversation(talk.messages[: count + 1], context=talk.context))
        new = answered.input_ids[len(prompt) :]
        labels = answered.labels[len(prompt) :]
        length = len([label for label in labels if label != -100])
        assert new[:length] == labels[:length]
        written = processor.tokenizer.decode(new[:length])
        ended = (talk.messages[count].text + processor.ends[0]).split()
        assert written.split() == ended or "".join(written.split()) == "".join(ended)
        learnt.append(length)
    assert whole.num_answer_tokens >= sum(learnt) - len(learnt)


@pytest.mark.skipif(not SHIPPED, reason="TRL, whose chat templates these are, is an extra")
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_template_that_trl_ships(path: Path) -> None:
    processor = shipped(path)
    for talk in islice(talks(), 3):
        assert_trained_is_generated(processor, talk)
        told = (Message("system", "Be kind."), *talk.messages)
        assert_trained_is_generated(processor, Conversation(told, context="a sign"))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_template_of_the_most_used_models(name: str) -> None:
    family = FAMILIES[name]
    tokenizer = tokenizer_of(family.template, eos=family.eos)
    processor = LlamaAdapterProcessor(None, tokenizer, template="chat")
    for talk in talks():
        assert_trained_is_generated(processor, talk)


@pytest.mark.parametrize("template", ["alpaca", "human-assistant"])
def test_templates_of_ours(template: str) -> None:
    processor = LlamaAdapterProcessor(None, tokenizer_of(""), template=template)
    for talk in talks():
        assert_trained_is_generated(processor, talk)


def test_letters_that_a_tokenizer_would_join_over_the_border_are_parted() -> None:
    """`:` and `Yes` are one token of this tokenizer, and so are two line breaks."""
    merges = [("Y", "e"), (":", "Ye"), ("Ċ", "Ċ")]
    for template in ("alpaca", "chat"):
        tokenizer = tokenizer_of(FAMILIES["chatml"].template, eos="<|im_end|>", merges=merges)
        processor = LlamaAdapterProcessor(None, tokenizer, template=template)
        for said in ("Yes.", "\nYes", "\n\n", "no"):
            talk = Conversation.ask("x:", answer=said).user("y").assistant(said)
            assert_trained_is_generated(processor, talk)


def test_the_templates_own_switch_is_found_and_kept(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(THINKING, eos="<|im_end|>")
    processor = LlamaAdapterProcessor(None, tokenizer, template="chat")
    talk = Conversation.ask("Who?", answer="Me.").user("And?")
    assert processor.render(talk) == (
        "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
        "Me.<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    processor.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "processor_config.json").read_text())
    assert stored["chat"]["switches"] == {"enable_thinking": False}
    assert stored["chat"]["ends"] == ["<|im_end|>"]
    loaded = LlamaAdapterProcessor.from_pretrained(tmp_path)
    assert loaded.encode(talk) == processor.encode(talk)
    # what version 0.1 saved says nothing of it
    del stored["chat"]
    (tmp_path / "processor_config.json").write_text(json.dumps(stored))
    assert LlamaAdapterProcessor.from_pretrained(tmp_path).encode(talk) == processor.encode(talk)


def test_another_switch_may_be_asked_for(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(THINKING, eos="<|im_end|>")
    switches = {"enable_thinking": True}
    processor = LlamaAdapterProcessor(None, tokenizer, template="chat", chat_switches=switches)
    # the template's own talk has the block; it stands in both, since an answer follows it there
    assert_trained_is_generated(processor, next(talks()))
    processor.save_pretrained(tmp_path)
    assert LlamaAdapterProcessor.from_pretrained(tmp_path).to_dict() == processor.to_dict()
    with pytest.raises(ConfigError, match="chat_switches are of template 'chat'"):
        LlamaAdapterProcessor(None, tokenizer, chat_switches=switches)


def test_another_chat_template_than_the_saved_one_is_refused(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(THINKING, eos="<|im_end|>")
    LlamaAdapterProcessor(None, tokenizer, template="chat").save_pretrained(tmp_path)
    path = tmp_path / "chat_template.jinja"
    template = path.read_text()
    for was, becomes in (("<|im_end|>", "<|end|>"), ("{{ m.role }}", "{{ m.role | upper }}")):
        path.write_text(template.replace(was, becomes))
        with pytest.raises(CheckpointError, match="opens or ends turns in another way"):
            LlamaAdapterProcessor.from_pretrained(tmp_path)


def test_a_header_of_talks_stands_in_prompts_and_one_of_prompts_in_talks() -> None:
    start = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    prompts = start + "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
    header = start.replace(
        "<|{{ m.role }}|>", "<|{{ m.role }}|>{{ '<|final|>' if m.role == 'assistant' }}"
    )
    header += "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    for template, opening in (
        (prompts, "<|assistant|><think>\n"),
        (header, "<|assistant|><|final|>"),
    ):
        processor = LlamaAdapterProcessor(None, tokenizer_of(template), template="chat")
        assert processor.render(Conversation.ask("x")) == f"<|user|>x<|end|>{opening}"
        assert_trained_is_generated(processor, next(talks()))


def test_where_a_template_ends_no_answer_the_eos_token_does() -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    processor = LlamaAdapterProcessor(None, tokenizer_of(template), template="chat")
    talk = Conversation.ask("x", answer="y").user("z")
    assert processor.render(talk) == "user: x\nassistant: y</s>\nuser: z\nassistant:"
    assert processor.stop_options == {"eos_token_id": [processor.tokenizer.eos_token_id]}


def test_an_end_of_several_tokens_is_a_stop_string() -> None:
    template = FAMILIES["chatml"].template.replace("<|im_end|>", "[end]")
    processor = LlamaAdapterProcessor(None, tokenizer_of(template), template="chat")
    options = processor.stop_options
    assert options["stop_strings"] == ["[end]"]
    assert options["tokenizer"] is processor.tokenizer
    assert processor.without_end(" me [end] ") == "me"


def test_a_system_message_that_a_template_shows_last_is_folded_into_the_first_question() -> None:
    template = (
        "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}[INST] "
        "{% if loop.last and messages[0].role == 'system' %}{{ messages[0].content }}\n\n"
        "{% endif %}{{ m.content }}[/INST]{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
    )
    processor = LlamaAdapterProcessor(None, tokenizer_of(template), template="chat")
    told = Message("system", "Be kind.")
    for talk in talks():
        assert_trained_is_generated(processor, Conversation((told, *talk.messages)))
    rendered = processor.render(Conversation((told, *talk.messages[:3])))
    assert rendered.startswith("[INST] Be kind.\n\nWho")


def test_a_template_that_numbers_its_turns_does_so_for_as_long_as_the_talk_lasts() -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}[Round {{ loop.index0 // 2 + 1 }}]\n"
        "Q: {{ m.content }}\nA:{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
    )
    processor = LlamaAdapterProcessor(None, tokenizer_of(template), template="chat")
    talk = Conversation.ask("x", answer="y")
    for _ in range(6):
        talk = talk.user("x").assistant("y")
    assert_trained_is_generated(processor, talk)
    assert "[Round 7]\nQ: x" in processor.render(talk)


def test_plain_text_that_reads_like_a_rendered_prompt_is_not_rendered_again() -> None:
    tokenizer = tokenizer_of(FAMILIES["chatml"].template, eos="<|im_end|>")
    for template in ("chat", "alpaca", "human-assistant"):
        processor = LlamaAdapterProcessor(None, tokenizer, template=template)
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": "Who?"}], add_generation_prompt=True
        )
        expected = processor(text=prompt)["input_ids"]
        plain = str(prompt).strip()
        with pytest.raises(PromptError, match="pass rendered=True"):
            processor(text=plain)
        with pytest.raises(PromptError, match="pass rendered=True"):
            processor.encode(str(processor.render(Conversation.ask("Who?", answer="Me."))))
        taken = processor(text=str(prompt), rendered=True)["input_ids"]
        assert torch.equal(taken, expected)
        asked = processor(text=plain, rendered=False)["input_ids"]
        assert torch.equal(asked, processor(Conversation.ask(plain))["input_ids"])
        for question in ("Who?", "What does <|im_start|>user mean?", "### Instruction:", "[INST]"):
            assert processor(text=question)["input_ids"].shape[0] == 1


def test_a_slot_in_a_rendered_text_is_found_by_its_text(image_processor: Any) -> None:
    from PIL import Image

    processor = LlamaAdapterProcessor(
        image_processor, tokenizer_of(""), visual_scope="placeholders", placeholder_text="<1>"
    )
    image = Image.new("RGB", (8, 8))
    prompt = processor.render(Conversation.ask("Who?", images=[image]))
    for text, rendered in ((prompt, None), (str(prompt), True)):
        batch = processor(text=text, images=image, rendered=rendered)
        assert int(batch["visual_mask"].sum()) == 3


ANSWERS = {"Where?": "In Rome, yes.", "How many?": "42", "Who?": "  Ann,\nand Bé"}


@pytest.mark.slow
@pytest.mark.skipif(not SHIPPED, reason="TRL, whose chat templates these are, is an extra")
def test_answers_learnt_by_heart_are_said_exactly_and_then_it_stops() -> None:
    """For each of the layouts that the shipped templates share."""
    layouts: dict[str, Path] = {}
    for path in SHIPPED:
        layouts.setdefault(str(shipped(path).render(next(talks()))), path)
    for path in layouts.values():
        said = say_by_heart(shipped(path))
        assert said == [answer.strip() for answer in ANSWERS.values()], path.name


def learnt_by_heart(processor: LlamaAdapterProcessor) -> LlamaForCausalLM:
    """A small model trained on three answers."""
    asked = [Conversation.ask(question) for question in ANSWERS]
    batch = processor(
        [talk.assistant(a) for talk, a in zip(asked, ANSWERS.values(), strict=True)], labels=True
    )
    torch.manual_seed(0)
    # its own end is another token, as in bases that were not trained to chat
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(processor.tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            eos_token_id=5,
            bos_token_id=None,
            pad_token_id=processor.tokenizer.pad_token_id,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(300):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss.item() < 0.02:
            break
    return model.eval()


def say_by_heart(processor: LlamaAdapterProcessor) -> list[str]:
    """What it says to the questions."""
    inputs = processor([Conversation.ask(question) for question in ANSWERS])
    tokens = learnt_by_heart(processor).generate(
        **inputs, max_new_tokens=40, do_sample=False, **processor.stop_options
    )
    new = tokens[:, inputs["input_ids"].shape[1] :]
    assert new.shape[1] < 40, "every answer ended"
    said = processor.tokenizer.batch_decode(new, skip_special_tokens=True)
    return [processor.without_end(text) for text in said]


@pytest.mark.parametrize("end", ["<|im_end|>", "[end]"])
def test_chat_and_evaluation_stop_where_the_template_ends_an_answer(
    end: str, tmp_path: Path
) -> None:
    """One end is a token that is not the base's own, the other is several tokens."""
    template = FAMILIES["chatml"].template.replace("<|im_end|>", end)
    processor = LlamaAdapterProcessor(None, tokenizer_of(template), template="chat")
    learnt_by_heart(processor).save_pretrained(tmp_path / "base")
    config = LlamaAdapterConfig.preset("v1", prompt_length=2, prompt_layers=1)
    model = LlamaAdapterForConditionalGeneration.from_base(
        str(tmp_path / "base"), config=config, seed=0
    )
    answers = [answer.strip() for answer in ANSWERS.values()]
    for question, answer in zip(ANSWERS, answers, strict=True):
        settings = GenerationSettings(max_new_tokens=40)
        said = ChatSession(model, processor, settings=settings).ask(question)
        assert (said.text, said.tokens < 40) == (answer, True)
    answerer = LocalAnswerer(model, processor, directory=tmp_path)
    asked = [Conversation.ask(question) for question in ANSWERS]
    found = answerer.answer(asked, Generation(max_new_tokens=40), seed=0)
    assert [answered.text for answered in found] == answers
