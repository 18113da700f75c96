"""What the tests share: the program itself, tokenizers, an image processor, a whole adapter."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

CORPUS = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
    "What colour is the star?\n\n### Input:\na red star\n\n### Response: The star is red. 1 2 3",
    "system user assistant You are a helpful assistant. Hello! Context: how many? two",
)

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""In the manner of Qwen: every turn between two special tokens."""

INST = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'system' %}"
    "{{ raise_exception('no system role here') }}"
    "{% elif message.role == 'user' %}[INST] {{ message.content }} [/INST]"
    "{% else %} {{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
"""In the manner of Llama 2: turns marked by ordinary text."""


# the same examples every time, however slow the machine is for a moment
settings.register_profile("same", deadline=None, derandomize=True, database=None)
settings.load_profile("same")


@pytest.fixture(scope="session", autouse=True)
def own_surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is found in or left in the user's cache folder, nor asked of a proxy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAMA_ADAPTER_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("NO_PROXY", "127.0.0.1,localhost")
        patch.setenv("no_proxy", "127.0.0.1,localhost")
        yield


@dataclass(frozen=True)
class Finished:
    """What a run of the program left behind."""

    status: int
    stdout: str
    stderr: str


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Finished]:
    """Run the program in this process; `stdin` is what the user types."""
    from llama_adapter.cli import main

    def run(*arguments: object, stdin: str = "") -> Finished:
        monkeypatch.setattr(sys, "argv", ["llama-adapter", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        out, err, status = io.StringIO(), io.StringIO(), 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
            except SystemExit as error:
                status = int(error.code or 0)
        return Finished(status, out.getvalue(), err.getvalue())

    return run


@pytest.fixture(scope="session")
def bytes_tokenizer() -> Any:
    """A byte-level BPE tokenizer without bos, with a ChatML template (the Qwen kind)."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>"],
        chat_template=CHATML,
    )


@pytest.fixture(scope="session")
def spaces_tokenizer() -> Any:
    """A BPE tokenizer that marks spaces and puts bos first, with [INST] turns (the Llama kind)."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    alphabet = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<unk>", "<s>", "</s>", *alphabet], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=INST,
        model_max_length=512,
    )


@pytest.fixture(scope="session")
def toy_tokenizer() -> Any:
    from tools.miniature.tokenizer import build_tokenizer

    return build_tokenizer()


@pytest.fixture(scope="session")
def image_processor() -> Any:
    from transformers import CLIPImageProcessorPil

    return CLIPImageProcessorPil(
        size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}, do_convert_rgb=False
    )


@pytest.fixture(scope="session")
def adapter_dir(
    tmp_path_factory: pytest.TempPathFactory, toy_tokenizer: Any, image_processor: Any
) -> Path:
    """A fresh V2 adapter on a random two-layer Llama and a random CLIP tower."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

    from llama_adapter import (
        LlamaAdapterConfig,
        LlamaAdapterForConditionalGeneration,
        LlamaAdapterProcessor,
    )

    root = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(toy_tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=toy_tokenizer.pad_token_id,
            bos_token_id=toy_tokenizer.bos_token_id,
            eos_token_id=toy_tokenizer.eos_token_id,
        )
    )
    llama.save_pretrained(root / "base")
    clip = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
        )
    )
    clip.save_pretrained(root / "vision")
    config = LlamaAdapterConfig.preset(
        "v2", prompt_length=2, visual_prompt_length=2, projector="linear"
    )
    model = LlamaAdapterForConditionalGeneration.from_base(
        str(root / "base"), vision=str(root / "vision"), config=config, seed=0
    )
    model.save_pretrained(root / "mine")
    processor = LlamaAdapterProcessor(image_processor, toy_tokenizer, template="toy")
    processor.save_pretrained(root / "mine")
    return root / "mine"
