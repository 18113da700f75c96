"""Answers behind one image: the same loss and gradients as a sample each, at fewer tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.data.files import open_source, stream_of, write_pictures
from tests.data.test_caption_texts import write_captions
from tests.data.test_packing import adapted, assert_same

from llama_adapter import ConfigError, LlamaAdapterProcessor, UnsupportedModelError
from llama_adapter.config import IGNORE_INDEX
from llama_adapter.conversation import Conversation
from llama_adapter.data.packing import Padding, assemble
from llama_adapter.data.samples import Sample
from llama_adapter.data.truncation import SampleEncoder
from llama_adapter.errors import DataError
from llama_adapter.processing.batching import EncodedSample

QUESTIONS = (
    ("What is there ?", "a red circle"),
    ("What is there ?", "one circle on the left"),
    ("Describe the image .", "a circle"),
)


@pytest.fixture
def reading(toy_tokenizer: Any, image_processor: Any) -> LlamaAdapterProcessor:
    return LlamaAdapterProcessor(
        image_processor,
        toy_tokenizer,
        template="toy",
        visual_scope="placeholders",
        placeholder_text="<|slot_0|><|slot_1|>",
    )


def branched(folder: Path, count: int = 3) -> list[Sample]:
    """Samples with a branch for every question, each about an image of its own."""
    samples = []
    for number, name in enumerate(write_pictures(folder / "pictures", count)):
        first, *others = (
            Conversation.ask(question, images=[str(folder / "pictures" / name)], answer=answer)
            for question, answer in QUESTIONS[: 2 + number % 2]
        )
        samples.append(
            Sample(id=str(number), kind="caption", conversation=first, branches=tuple(others))
        )
    return samples


def encoded(samples: list[Sample], encoder: SampleEncoder) -> list[EncodedSample]:
    [cuts] = {tuple(cut.first for cut in encoder.cut(sample)) for sample in samples}
    assert cuts == (0,)
    return [encoder.encode_sample(s, 0, 1 + len(s.branches)) for s in samples]


def apart(samples: list[Sample]) -> list[Sample]:
    """A sample for every branch."""
    return [
        replace(sample, conversation=conversation, branches=())
        for sample in samples
        for conversation in (sample.conversation, *sample.branches)
    ]


@pytest.mark.parametrize("padding", ["packed", "padded"])
@pytest.mark.parametrize(
    ("base", "attention", "settings"),
    [
        ("llama", "sdpa", {"placeholder_attention": "own"}),
        ("llama", "eager", {"placeholder_attention": "own"}),
        ("qwen3", "sdpa", {"placeholder_attention": "all"}),
        ("llama", "sdpa", {"fusion": "late", "placeholder_attention": "all"}),
    ],
)
def test_branches_are_learned_as_if_alone(
    base: str,
    attention: str,
    settings: Any,
    padding: Padding,
    reading: LlamaAdapterProcessor,
    tmp_path: Path,
) -> None:
    encoder = SampleEncoder(reading, row_length=256)
    samples = branched(tmp_path)
    together = encoded(samples, encoder)
    alone = encoded(apart(samples), encoder)
    rows = [together] if padding == "packed" else [[sample] for sample in together]
    assert sum(len(s.encoded) for s in together) < 0.8 * sum(len(s.encoded) for s in alone)
    model = adapted(base, attention=attention, visual_scope="placeholders", **settings)
    assert_same(
        model,
        assemble(rows, reading, padding=padding, row_length=256),
        assemble([[s] for s in alone], reading, padding="padded", row_length=256),
    )


def test_a_branch_keeps_the_token_that_its_answer_is_learned_from(
    reading: LlamaAdapterProcessor, tmp_path: Path
) -> None:
    [sample] = encoded(branched(tmp_path, 1), SampleEncoder(reading, row_length=256))
    tokens = sample.encoded
    assert len(tokens.branches) == 2
    for start in (0, *tokens.branches):
        assert tokens.labels[start] == IGNORE_INDEX
    prompts = [tokens.positions[start] for start in tokens.branches]
    assert prompts == [tokens.branches[0]] * 2
    assert sorted(set(tokens.positions)) == list(range(max(tokens.positions) + 1))


def test_what_does_not_fit_a_row_becomes_another_piece(
    reading: LlamaAdapterProcessor, tmp_path: Path
) -> None:
    [sample] = branched(tmp_path, 1)
    sample = replace(sample, branches=sample.branches * 10)
    encoder = SampleEncoder(reading, row_length=64)
    cuts = encoder.cut(sample)
    assert len(cuts) > 1
    assert [cut.first for cut in cuts[1:]] == [cut.stop for cut in cuts[:-1]]
    assert cuts[-1].stop == 11
    for cut in cuts:
        found = encoder.encode_sample(sample, cut.first, cut.stop)
        assert len(found.encoded) == cut.tokens <= 64
        assert found.encoded.num_answer_tokens == cut.answer_tokens
    long = replace(sample, branches=(Conversation.ask("a " * 80, images=["i"], answer="b"),))
    with pytest.raises(DataError, match=r"0: branch 2 has \d+ tokens; a row holds 64"):
        encoder.cut(long)
    silent = Conversation.ask("What ?", images=["i"])
    unanswered = replace(sample, branches=(*sample.branches[:2], silent))
    with pytest.raises(DataError, match="0: branch 4 holds no answer token to learn"):
        encoder.cut(unanswered)


def test_branches_begin_with_the_same_images(
    reading: LlamaAdapterProcessor, tmp_path: Path
) -> None:
    [sample] = branched(tmp_path, 1)
    other = Conversation.ask("What ?", answer="a").user("And ?", images=["x"]).assistant("b")
    with pytest.raises(DataError, match="must begin with the same images"):
        SampleEncoder(reading, row_length=256).cut(replace(sample, branches=(other,)))


def test_a_recipe_asks_for_answers(reading: LlamaAdapterProcessor, tmp_path: Path) -> None:
    path = write_captions(tmp_path)
    options = {"path": path, "images": tmp_path, "split": "train"}
    one, five = (open_source("caption_tasks", "caption", **options, answers=n) for n in (1, 5))
    assert one.fingerprint() != five.fingerprint()
    sample = five[0]
    assert len(sample.branches) == 4
    # the first answer is what it is alone
    assert sample.conversation == one[0].conversation
    batch = next(stream_of(five, reading, "caption", rows=2))
    assert batch.inputs["attention_mask"].shape == (2, 1, 256, 256)
    assert batch.answer_tokens == int((batch.inputs["labels"] != IGNORE_INDEX).sum())
    with pytest.raises(ConfigError, match="flash attention takes no mask"):
        batch.joined()


def test_captions_of_an_image_share_their_prompt(
    reading: LlamaAdapterProcessor, tmp_path: Path
) -> None:
    path = write_captions(tmp_path)
    options = {"path": path, "images": tmp_path, "split": "train", "answers": 5, "text_share": 0.5}
    source, mixed = (
        open_source("caption_tasks", "caption", **options, captions_share=share)
        for share in (1.0, 0.5)
    )
    encoder = SampleEncoder(reading, row_length=256)
    for sample in map(source.__getitem__, range(len(source))):
        all_of_it = (sample.conversation, *sample.branches)
        assert len({c.messages[0].text for c in all_of_it}) == 1
        assert all(len(c.images) == 1 and c.context is None for c in all_of_it)
        # each caption once
        assert len({c.turns[-1].text for c in all_of_it}) == len(all_of_it)
        [cut] = encoder.cut(sample)
        alone = [encoder.cut(each)[0] for each in apart([sample])]
        [prompt] = {each.tokens - each.answer_tokens for each in alone}
        if len(alone) > 1:
            # the prompt once, less its last token, which each answer is learned from
            assert cut.tokens == prompt - 1 + sum(each.answer_tokens + 1 for each in alone)
    assert len({source[n].conversation.messages[0].text for n in range(len(source))}) > 1
    assert any(mixed[n].conversation.context for n in range(len(mixed)))


def test_a_mask_says_what_each_token_sees_whatever_the_attention() -> None:
    tokens = torch.arange(20)[None]
    mask = torch.ones(1, 1, 20, 20, dtype=torch.bool).tril()
    for attention in ("sdpa", "eager"):
        model = adapted("llama", attention=attention)
        with torch.no_grad():
            found = model(tokens, attention_mask=mask).logits
            torch.testing.assert_close(found, model(tokens).logits)
    with pytest.raises(UnsupportedModelError, match="sees 16 tokens in some layers"):
        adapted("gemma3")(tokens, attention_mask=mask)
    model.set_attn_implementation("flex_attention")
    with pytest.raises(UnsupportedModelError, match="flex_attention attention takes no mask"):
        model(tokens, attention_mask=mask)
