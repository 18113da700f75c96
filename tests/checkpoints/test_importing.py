from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, LlamaForCausalLM

from llama_adapter import LlamaAdapterConfig, LlamaAdapterForConditionalGeneration
from llama_adapter.checkpoints import import_released
from llama_adapter.checkpoints.released_export import export_released
from llama_adapter.checkpoints.settings import Overrides
from llama_adapter.checkpoints.vision_encoder import read_openai_clip
from llama_adapter.errors import CheckpointError

KINDS = ("v1-text", "v2-multimodal-bias", "v2-multimodal-lora-bias", "v2-chat", "v2-chat-adapter")
OVERRIDES = Overrides(prompt_length=3, projector_heads=4)


def bring_in(world: Any, kind: str, out: Path, **options: Any) -> Any:
    options.setdefault("base", world.root / "base")
    if not options["base"].exists():
        world.base()
    is_visual = kind.startswith("v2-multimodal")
    return import_released(
        world.save_released(kind),
        vision=world.save_clip() if is_visual else None,
        out=out,
        overrides=OVERRIDES,
        **options,
    )


def inputs(world: Any, kind: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    given = {"input_ids": torch.randint(3, world.vocab, (2, 7), generator=generator)}
    if kind.startswith("v2-multimodal"):
        given["pixel_values"] = torch.randn(2, 3, 16, 16, generator=generator)
    return given


def logits(directory: Path, given: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return LlamaAdapterForConditionalGeneration.from_pretrained(directory)(**given).logits


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_becomes_an_adapter_directory(kind: str, world: Any, tmp_path: Path) -> None:
    report = bring_in(world, kind, tmp_path / "out")
    assert report.kind == kind.removesuffix("-adapter")
    content = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert content["base"]["name_or_path"] == "base"
    assert content["adapter"] == report.config.to_dict()
    model = AutoModelForImageTextToText.from_pretrained(str(tmp_path / "out"))
    assert model(**inputs(world, kind)).logits.isfinite().all()
    if kind.startswith("v2-multimodal"):
        assert content["vision"]["name_or_path"] == "vision"
        assert content["adapter"]["channel_order"] == "bgr"
        assert content["adapter"]["caption_instruction"] == "Generate caption of this image"


@pytest.mark.parametrize("kind", KINDS)
def test_import_export_import_is_bit_identical(kind: str, world: Any, tmp_path: Path) -> None:
    bring_in(world, kind, tmp_path / "first")
    source = torch.load(world.root / f"{kind}.pth", weights_only=True)
    path = export_released(tmp_path / "first", out=tmp_path / "back")
    back = torch.load(path, weights_only=True)
    assert back.keys() == source.keys()
    assert back.get("config") == source.get("config")
    before, after = source.get("model", source), back.get("model", back)
    assert list(before) == list(after)
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor), name
    vision = tmp_path / "first" / "vision"
    import_released(
        path,
        base=world.root / "base",
        vision=vision if vision.exists() else None,
        out=tmp_path / "second",
    )  # what the tensors do not say is beside them
    first, second = (
        json.loads((tmp_path / d / "adapter_config.json").read_text())["adapter"]
        for d in ("first", "second")
    )
    assert first == second
    for name in ("adapter_model.safetensors", "released_extras.safetensors"):
        before, after = (load_file(tmp_path / d / name) for d in ("first", "second"))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[k], after[k]) for k in before)


def test_half_precision_files_go_back_as_they_were(make_world: Any, tmp_path: Path) -> None:
    world = make_world(dtype=torch.float16)
    bring_in(world, "v2-chat", tmp_path / "out")
    assert load_file(tmp_path / "out" / "adapter_model.safetensors")["norm.weight"].dtype == (
        torch.float32
    )
    path = export_released(tmp_path / "out", out=tmp_path / "back")
    source = torch.load(world.root / "v2-chat.pth", weights_only=True)["model"]
    back = torch.load(path, weights_only=True)["model"]
    assert all(torch.equal(back[n], t) and back[n].dtype == t.dtype for n, t in source.items())


def test_an_adapter_that_was_trained_on_goes_back_too(world: Any, tmp_path: Path) -> None:
    """No note of the source is left then; the final norm, which learned, is in the file."""
    bring_in(world, "v2-multimodal-lora-bias", tmp_path / "out")
    model = LlamaAdapterForConditionalGeneration.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        for parameter in model.group_parameters("language"):
            parameter.add_(0.01)
    model.save_pretrained(tmp_path / "trained")
    path = export_released(tmp_path / "trained", out=tmp_path / "back")
    content = torch.load(path, weights_only=True)
    assert content["config"] == {"w_bias": True, "w_lora": True, "lora_rank": 4}
    import_released(
        path,
        base=world.root / "base",
        vision=world.root / "clip.pt",
        out=tmp_path / "again",
        overrides=OVERRIDES,
    )
    given = inputs(world, "v2-multimodal-lora-bias")
    torch.testing.assert_close(
        logits(tmp_path / "again", given), logits(tmp_path / "trained", given), rtol=0, atol=0
    )


def test_saved_elsewhere_it_still_finds_its_base(world: Any, tmp_path: Path) -> None:
    bring_in(world, "v2-multimodal-bias", tmp_path / "out")
    given = inputs(world, "v2-multimodal-bias")
    model = LlamaAdapterForConditionalGeneration.from_pretrained(tmp_path / "out")
    model.save_pretrained(tmp_path / "run" / "final")
    assert torch.equal(logits(tmp_path / "run" / "final", given), logits(tmp_path / "out", given))
    model.save_pretrained(tmp_path / "out")
    content = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert content["base"]["name_or_path"] == "base"
    moved = (tmp_path / "out").rename(tmp_path / "moved")
    assert logits(moved, given).isfinite().all()


def test_a_hugging_face_base_is_referenced(world: Any, tmp_path: Path) -> None:
    bring_in(world, "v2-chat-adapter", tmp_path / "converted")
    base = tmp_path / "hugging-face"
    LlamaForCausalLM.from_pretrained(tmp_path / "converted" / "base").save_pretrained(base)
    (base / "params.json").write_text('{"dim": 1, "head_dim": 2}')  # as in Mistral's repositories
    report = bring_in(world, "v2-chat-adapter", tmp_path / "out", base=base)
    assert report.base == "referenced"
    assert not (tmp_path / "out" / "base").exists()
    content = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert content["base"]["name_or_path"] == str(base)
    given = inputs(world, "v2-chat-adapter")
    assert logits(tmp_path / "out", given).isfinite().all()


def test_a_hugging_face_vision_tower_is_referenced(world: Any, tmp_path: Path) -> None:
    bring_in(world, "v2-multimodal-bias", tmp_path / "first")
    tower = (tmp_path / "first" / "vision").rename(tmp_path / "clip")
    import_released(
        world.root / "v2-multimodal-bias.pth",
        base=world.root / "base",
        vision=tower,
        out=tmp_path / "out",
        overrides=OVERRIDES,
    )
    content = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert content["vision"]["name_or_path"] == str(tower)
    assert logits(tmp_path / "out", inputs(world, "v2-multimodal-bias")).isfinite().all()


def test_what_the_file_leaves_open_is_assumed_aloud(world: Any, tmp_path: Path) -> None:
    world.base()
    report = import_released(
        world.save_released("v1-text"), base=world.root / "base", out=tmp_path / "v1"
    )
    assert (report.config.prompt_length, report.config.prompt_layers) == (3, 4)
    (warning,) = [warning for warning in report.warnings if "--prompt-length" in warning]
    assert "assumed 3 prompts in the last 4 layers" in warning
    assert "3, 4, 6, 12 fit its 12 rows" in warning


def test_tens_of_another_size_are_assumed_aloud(make_world: Any, tmp_path: Path) -> None:
    world = make_world(prompt_length=5)
    path, base = world.save_released("v1-text"), world.base()
    report = import_released(path, base=base, out=tmp_path / "out")
    assert (report.config.prompt_length, report.config.prompt_layers) == (10, 2)
    assert any("assumed 10 prompts in the last 2 layers" in w for w in report.warnings)
    report = import_released(
        path, base=base, out=tmp_path / "5", overrides=Overrides(prompt_length=5)
    )
    assert report.config.prompt_layers == 4
    assert not any("--prompt-length" in w for w in report.warnings)


def test_heads_that_nothing_says_are_not_guessed(world: Any, tmp_path: Path) -> None:
    path = world.save_released("v2-multimodal-bias")
    says = r"give --visual-heads N \(divisors of 32: 1, 2, 4, 8, 16, 32\)"
    with pytest.raises(CheckpointError, match=says):
        import_released(path, base=world.base(), vision=world.save_clip(), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_description_beside_the_file_is_read(world: Any, tmp_path: Path) -> None:
    world.base()
    (world.root / "meta.json").write_text(json.dumps({"visual": {"v_num_heads": 2}}))
    report = import_released(
        world.save_released("v2-multimodal-bias"),
        base=world.root / "base",
        vision=world.save_clip(),
        out=tmp_path / "out",
    )
    assert report.config.projector_heads == 2


def visual_query(tensors: dict[str, torch.Tensor], features: torch.Tensor) -> torch.Tensor:
    """The projector of the released V2 models, written out: one block, 4 heads."""

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
        return x * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    query = tensors["visual_query.weight"]
    x = torch.cat([query, norm("clip_proj_norm", linear("clip_proj", features))])
    qkv = linear("visual_blocks.0.attn.qkv", norm("visual_blocks.0.norm1", x))
    q, k, v = qkv.view(len(x), 3, 4, -1).permute(1, 2, 0, 3)
    mixed = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
    x = x + linear("visual_blocks.0.attn.proj", mixed.permute(1, 0, 2).flatten(1))
    h = linear("visual_blocks.0.mlp.fc1", norm("visual_blocks.0.norm2", x))
    h = h * (1 + torch.erf(h / 2**0.5)) / 2
    x = x + linear("visual_blocks.0.mlp.fc2", h)
    return norm("visual_proj_norm", linear("visual_proj", x[: len(query)]))


@pytest.mark.parametrize("ratio", [2.0, 1.5, 33 / 32, 4.0])
@pytest.mark.parametrize("kind", KINDS[1:3])
def test_the_mlp_ratio_is_read_from_the_file(
    kind: str, ratio: float, make_world: Any, tmp_path: Path
) -> None:
    world = make_world(mlp_ratio=ratio)
    report = bring_in(world, kind, tmp_path / "in")
    assert report.config.projector_mlp_ratio == ratio
    tensors = torch.load(world.root / f"{kind}.pth")["model"]
    assert tensors["visual_blocks.0.mlp.fc1.weight"].shape == (int(32 * ratio), 32)
    model = LlamaAdapterForConditionalGeneration.from_pretrained(tmp_path / "in")
    features = torch.randn(17, world.clip_out, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        found = model.visual(features[None])[0]
    torch.testing.assert_close(found, visual_query(tensors, features), rtol=0, atol=2e-5)
    back = torch.load(export_released(tmp_path / "in", out=tmp_path / "back"))["model"]
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_adapters_of_ours_keep_their_mlp_ratio(world: Any, tmp_path: Path) -> None:
    world.base()
    import_released(world.save_released("v2-chat"), base=world.root / "base", out=tmp_path / "chat")
    tower = tmp_path / "tower"
    read_openai_clip(world.save_clip()).save_pretrained(tower)
    config = LlamaAdapterConfig.preset(
        "released-v2-bias", prompt_layers=4, projector_width=32, projector_heads=4,
        projector_blocks=1, projector_mlp_ratio=1.5,
    )  # fmt: skip
    model = LlamaAdapterForConditionalGeneration.from_base(
        str(tmp_path / "chat" / "base"), vision=str(tower), config=config, seed=0
    )
    model.save_pretrained(tmp_path / "ours")
    again = LlamaAdapterForConditionalGeneration.from_pretrained(tmp_path / "ours")
    assert again.adapter_config.projector_mlp_ratio == 1.5
    path = export_released(tmp_path / "ours", out=tmp_path / "back")
    report = import_released(
        path, base=tmp_path / "chat" / "base", vision=tower, out=tmp_path / "again"
    )
    assert report.config.projector_mlp_ratio == 1.5
    given = inputs(world, "v2-multimodal-bias")
    assert torch.equal(logits(tmp_path / "again", given), logits(tmp_path / "ours", given))


def test_progress_reaches_the_end(world: Any, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    bring_in(world, "v2-chat", tmp_path / "out", progress=lambda *at: seen.append(at))
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] > 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_an_import_that_dies_leaves_nothing(
    error: type[BaseException], world: Any, tmp_path: Path
) -> None:
    def die(done: int, total: int) -> None:
        raise error

    with pytest.raises(error):
        bring_in(world, "v2-chat", tmp_path / "new" / "out", progress=die)
    assert not (tmp_path / "new").exists()


def test_what_a_killed_run_left_is_removed(world: Any, tmp_path: Path) -> None:
    left = tmp_path / ".out.partial-99999999"
    left.mkdir()
    (left / "half").write_text("x")
    bring_in(world, "v2-chat", tmp_path / "out")
    assert not left.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "world"]


def test_the_command_speaks_json(world: Any, cli: Callable[..., Any], tmp_path: Path) -> None:
    done = cli(
        "import", world.save_released("v2-chat"), "--base", world.base(),
        "--out", tmp_path / "out", "--json",
    )  # fmt: skip
    assert done.status == 0, done.stderr
    described = json.loads(done.stdout)
    assert described["kind"] == "v2-chat"
    assert described["config"]["scale_side"] == "input"
    assert "has no tokenizer" in done.stderr
    assert any("has no tokenizer" in warning for warning in described["warnings"])


def test_a_bad_tokenizer_is_refused_before_the_base_is_converted(
    world: Any, tmp_path: Path
) -> None:
    (world.base() / "tokenizer.model").write_bytes(b"\x00\xff no tokenizer")
    seen: list[tuple[int, int]] = []
    with pytest.raises(CheckpointError, match=r"tokenizer\.model is neither"):
        bring_in(world, "v2-chat", tmp_path / "out", progress=lambda *at: seen.append(at))
    assert seen == []
    (world.root / "base" / "tokenizer.model").unlink()
    bring_in(world, "v2-chat", tmp_path / "out")
    base = tmp_path / "out" / "base"
    for content in ("{}", "no JSON"):
        (base / "tokenizer.json").write_text(content)
        with pytest.raises(CheckpointError, match=f"cannot load the tokenizer of .{base}"):
            bring_in(world, "v2-chat", tmp_path / "again", base=base)
