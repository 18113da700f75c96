"""Make `tests/saved/adapters`: adapter directories as version 0.1 wrote them (commit 14ab2ee).

Run once, with that commit's `src` on the path; what later code must read is never made again:

    PYTHONPATH=src python tests/saved/make_adapters.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tools.miniature.tokenizer import build_tokenizer
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from llama_adapter import (
    LlamaAdapterConfig,
    LlamaAdapterForConditionalGeneration,
    LlamaAdapterProcessor,
)

SLOTS = "".join(f"<|slot_{index}|>" for index in range(3))
SMALL = {"prompt_length": 3, "projector_width": 8, "projector_heads": 2, "projector_blocks": 1}
KINDS: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    # name: base, encoder, settings
    "v2": ("llama", "siglip", {"preset": "v2", "visual_prompt_length": 4}),
    "v1": ("gemma2", None, {"preset": "v1", "prompt_layers": 2}),
    "chat": ("llama", None, {"preset": "v2-chat"}),
    "late": (
        "llama",
        "clip",
        {"preset": "released-v2-lora-bias", "visual_prompt_length": 3, "prompt_layers": 2,
         "lora_rank": 2},
    ),
    "own": (
        "llama",
        "siglip",
        {"preset": "v2", "visual_prompt_length": 3, "visual_scope": "slots", "slot_reads": "own",
         "projector": "linear"},
    ),
}  # fmt: skip


def main(root: Path) -> None:
    tokenizer = build_tokenizer()
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    eyes = {
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    }
    torch.manual_seed(0)
    made = {
        "llama": LlamaForCausalLM(LlamaConfig(**sizes, **ids)),
        "gemma2": Gemma2ForCausalLM(
            Gemma2Config(**sizes, **ids, head_dim=4, sliding_window=4, query_pre_attn_scalar=4)
        ),
        "siglip": SiglipVisionModel(SiglipVisionConfig(**eyes)),
        "clip": CLIPVisionModelWithProjection(CLIPVisionConfig(**eyes, projection_dim=6)),
    }
    for name, model in made.items():
        model.save_pretrained(root / name)
    images = CLIPImageProcessorPil(
        size={"height": 8, "width": 8}, do_center_crop=False, do_convert_rgb=False
    )
    for name, (base, encoder, settings) in KINDS.items():
        config = LlamaAdapterConfig.preset(settings.pop("preset"), **{**SMALL, **settings})
        model = LlamaAdapterForConditionalGeneration.from_base(
            str(root / base), None if encoder is None else str(root / encoder), config, seed=0
        )
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for _, parameter in model.adapter.named_parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
        directory = root / name
        model.save_pretrained(directory)
        semantics = model.adapter_config
        LlamaAdapterProcessor(
            images if semantics.is_multimodal else None,
            tokenizer,
            template="alpaca",
            visual_scope=semantics.visual_scope,
            slot_text=SLOTS if semantics.visual_scope == "slots" else None,
            channel_order=semantics.channel_order,
        ).save_pretrained(directory)
        path = directory / "adapter_config.json"
        content = json.loads(path.read_text())
        for key in ("base", "vision"):
            if content[key] is not None:
                content[key]["name_or_path"] = f"../{Path(content[key]['name_or_path']).name}"
        path.write_text(json.dumps(content, indent=2) + "\n")
        given = {"input_ids": torch.randint(3, len(tokenizer), (2, 6), generator=generator)}
        if semantics.is_multimodal:
            given["pixel_values"] = torch.randn(2, 3, 8, 8, generator=generator)
        if semantics.visual_scope == "slots":
            given["visual_mask"] = torch.tensor([[False, True, True, True, False, False]] * 2)
        again = LlamaAdapterForConditionalGeneration.from_pretrained(directory)
        with torch.no_grad():
            given["logits"] = again(**given).logits.contiguous()
        save_file(given, directory / "expected.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "adapters"))
