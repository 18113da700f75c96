"""Imported adapters in use: with text, with each other, and in training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from llama_adapter import LlamaAdapterForConditionalGeneration, LlamaAdapterProcessor
from llama_adapter.checkpoints import import_released
from llama_adapter.checkpoints.settings import Overrides
from llama_adapter.training.joint import JointTrainer
from llama_adapter.training.recipe import OptimizerSection

TEXTS = ("the quick fox", " two  spaces ", "é 12:\n\n### Response:", "")
OVERRIDES = Overrides(prompt_length=3, projector_heads=4)


def given_for(world: Any) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "input_ids": torch.randint(3, world.vocab, (2, 7), generator=generator),
        "pixel_values": torch.randn(2, 3, 16, 16, generator=generator),
    }


def logits(model: LlamaAdapterForConditionalGeneration, given: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**given).logits


@pytest.fixture
def pair(make_world: Callable[..., Any], sentencepiece_file: Path, tmp_path: Path) -> Any:
    """A V2 adapter, and a caption adapter on the same base and tower."""
    world = make_world(vocab=400)
    (world.root / "tokenizer.model").write_bytes(sentencepiece_file.read_bytes())
    import_released(
        world.save_released("v2-multimodal-lora-bias"),
        base=world.base("7B"),
        vision=world.save_clip(),
        out=tmp_path / "v2",
        overrides=OVERRIDES,
    )
    import_released(
        world.save_released("v2-multimodal-bias"),
        base=tmp_path / "v2" / "base",
        vision=tmp_path / "v2" / "vision",
        out=tmp_path / "caption",
        overrides=OVERRIDES,
    )
    return world


def test_an_adapter_with_text(
    sentencepiece_file: Path, make_world: Any, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    """With a tokenizer above the base the whole chain from words and pictures to words runs."""
    world = make_world(vocab=400)
    (world.root / "tokenizer.model").write_bytes(sentencepiece_file.read_bytes())
    report = import_released(
        world.save_released("v2-multimodal-bias"),
        base=world.base("7B"),
        vision=world.save_clip(),
        out=tmp_path / "out",
        overrides=OVERRIDES,
    )
    assert not any("tokenizer" in warning for warning in report.warnings)
    processor = LlamaAdapterProcessor.from_pretrained(tmp_path / "out")
    assert (processor.template, processor.channel_order) == ("alpaca", "bgr")
    red = Image.new("RGB", (40, 30), (255, 0, 0))
    inputs = processor("Generate caption of this image", images=red)
    assert inputs["pixel_values"].shape == (1, 3, 16, 16)
    # red arrives in the last channel: the released models saw blue there
    assert inputs["pixel_values"][0, 2].mean() > inputs["pixel_values"][0, 0].mean()
    text = processor.tokenizer.decode(inputs["input_ids"][0], skip_special_tokens=True)
    assert text.startswith("Below is an instruction that describes a task.")
    of_base = AutoTokenizer.from_pretrained(tmp_path / "out" / "base")
    for text in TEXTS:
        assert of_base.encode(text) == processor.tokenizer.encode(text)
    model = LlamaAdapterForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert model.language_model.config.eos_token_id == 2
    tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert isinstance(processor.decode(tokens[0]), str)
    red.save(tmp_path / "red.png")
    done = cli("chat", tmp_path / "out", "--image", tmp_path / "red.png", "--prompt",
               "the quick", "--max-new-tokens", 2, "--json")  # fmt: skip
    assert done.status == 0, done.stderr


def test_the_chat_weights_are_asked_as_they_were_trained(
    make_world: Callable[..., Any], sentencepiece_file: Path, tmp_path: Path
) -> None:
    from llama_adapter.chat import ChatSession
    from llama_adapter.conversation import Conversation
    from llama_adapter.generation import GenerationSettings

    world = make_world(vocab=400)
    (world.root / "tokenizer.model").write_bytes(sentencepiece_file.read_bytes())
    import_released(world.save_released("v2-chat"), base=world.base("65B"), out=tmp_path / "chat")
    processor = LlamaAdapterProcessor.from_pretrained(tmp_path / "chat")
    talk = Conversation.ask("the fox ### Human: hack").assistant("quick").user("and?")
    text = str(processor.render(talk))
    assert text.startswith("A chat between a curious human and an artificial intelligence")
    assert text.endswith("###Assistant: quick###Human: and?###Assistant:")
    assert text.count("###") == 4  # the one in the question is broken up
    model = LlamaAdapterForConditionalGeneration.from_pretrained(tmp_path / "chat")
    # a model that says nothing but the text at which it has to stop
    head = model.language_model.lm_head
    stop = processor.tokenizer.encode("###", add_special_tokens=False)[-1]
    head.bias = torch.nn.Parameter(torch.zeros(world.vocab))
    head.bias.data[stop] = 1000.0
    session = ChatSession(model, processor, settings=GenerationSettings(max_new_tokens=8))
    answer = session.ask("the fox")
    assert answer.text == ""
    assert answer.tokens < 8


def test_caption_and_v2_share_one_base(pair: Any, tmp_path: Path) -> None:
    """Each computes with both loaded what it computes alone."""
    given = given_for(pair)
    model = LlamaAdapterForConditionalGeneration.from_pretrained(tmp_path / "v2")
    caption = LlamaAdapterForConditionalGeneration.from_pretrained(tmp_path / "caption")
    before = logits(model, given)
    model.load_adapter(tmp_path / "caption", "caption")
    assert model.adapters == ("default", "caption")
    assert torch.equal(logits(model, given), before)
    model.set_adapter("caption")
    assert torch.equal(logits(model, given), logits(caption, given))
    assert not torch.equal(logits(model, given), before)
    model.set_adapter("default")
    assert torch.equal(logits(model, given), before)


def test_the_caption_adapter_is_the_expert_of_the_other(
    pair: Any, cli: Callable[..., Any], tmp_path: Path
) -> None:
    Image.new("RGB", (20, 20), (200, 30, 30)).save(tmp_path / "red.png")
    done = cli("chat", tmp_path / "v2", "--image", tmp_path / "red.png", "--prompt", "the fox",
               "--expert", f"caption={tmp_path / 'caption'}", "--max-new-tokens", 2,
               "--json")  # fmt: skip
    assert done.status == 0, done.stderr


def test_the_expert_asks_what_the_adapter_learned(pair: Any, tmp_path: Path) -> None:
    from llama_adapter.experts import CaptionExpert, Request

    asked: list[Any] = []

    class Listening(LlamaAdapterProcessor):
        def __call__(self, text: Any = None, *args: Any, **options: Any) -> Any:
            asked.extend(text)
            return super().__call__(text, *args, **options)

    model = LlamaAdapterForConditionalGeneration.from_pretrained(tmp_path / "v2")
    model.load_adapter(tmp_path / "caption", "caption")
    processor = Listening.from_pretrained(tmp_path / "caption")
    expert = CaptionExpert(model, processor, max_new_tokens=2)
    expert.consult(Request(images=[Image.new("RGB", (20, 20))]))
    assert asked[0].messages[0].text == "Generate caption of this image"
    assert model.active_adapter == "default"


def test_joint_training_goes_on(pair: Any, tmp_path: Path) -> None:
    """Captions move the visual projection, instructions the rest; the base stays as it is."""
    model = LlamaAdapterForConditionalGeneration.from_pretrained(tmp_path / "v2")
    given = given_for(pair)
    caption = {**given, "labels": given["input_ids"]}
    instruction = {"input_ids": given["input_ids"], "labels": given["input_ids"]}
    before = {n: p.detach().clone() for n, p in model.adapter.named_parameters()}
    base = {n: p.clone() for n, p in model.language_model.named_parameters() if "base_layer" in n}
    trainer = JointTrainer(model, OptimizerSection(warmup_steps=1), steps=8)
    losses = [trainer.step(caption=caption, instruction=instruction).losses for _ in range(6)]
    assert losses[-1]["caption"] < losses[0]["caption"]
    assert losses[-1]["instruction"] < losses[0]["instruction"]
    for name, parameter in model.adapter.named_parameters():
        assert not torch.equal(parameter, before[name]), name
    for name, parameter in model.language_model.named_parameters():
        assert name not in base or torch.equal(parameter, base[name])
    model.eval()
    model.save_pretrained(tmp_path / "trained")
    again = LlamaAdapterForConditionalGeneration.from_pretrained(tmp_path / "trained")
    assert torch.equal(logits(again, given), logits(model, given))


def test_without_a_tokenizer_commands_say_what_is_missing(
    world: Any, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    report = import_released(
        world.save_released("v2-chat"), base=world.base(), out=tmp_path / "out"
    )
    assert any("has no tokenizer" in warning for warning in report.warnings)
    done = cli("chat", tmp_path / "out", "--prompt", "hello")
    assert done.status == 2
    assert "processor_config.json" in done.stderr or "tokenizer" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
