"""The code of docs/attach-your-own-llm.md runs as it stands, on tiny real models."""

from __future__ import annotations

import re
from pathlib import Path

from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
)

PAGE = Path(__file__).parents[1] / "docs" / "attach-your-own-llm.md"


def test_the_page_runs(tmp_path, monkeypatch, capsys, bytes_tokenizer):
    monkeypatch.chdir(tmp_path)
    small = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    LlamaForCausalLM(LlamaConfig(vocab_size=len(bytes_tokenizer), **small)).save_pretrained("base")
    bytes_tokenizer.save_pretrained("base")
    tower = CLIPVisionModel(CLIPVisionConfig(image_size=16, patch_size=8, **small))
    tower.save_pretrained("tower")
    CLIPImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    ).save_pretrained("tower")
    Image.new("RGB", (20, 30), "red").save("star.png")

    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    code = "\n".join(blocks)
    assert len(blocks) == 2
    code = code.replace('"Qwen/Qwen3-0.6B"', '"base"')
    code = code.replace('"openai/clip-vit-large-patch14"', '"tower"')
    names: dict[str, object] = {}
    exec(compile(code, str(PAGE), "exec"), names)

    assert capsys.readouterr().out.startswith("[")
    assert {"adapter_model.safetensors", "adapter_config.json"} <= {
        path.name for path in (tmp_path / "mine").iterdir()
    }
    again = type(names["model"]).from_pretrained("mine")
    assert again.adapter_config.visual_prompt_length == 20
