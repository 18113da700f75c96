from __future__ import annotations

import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from llama_adapter.checkpoints.torch_files import read_torchscript
from llama_adapter.checkpoints.vision_encoder import read_openai_clip
from llama_adapter.errors import CheckpointError

BLOCK = "transformer.resblocks.0."


class Scripted(nn.Module):
    """Parameters under dotted names, as in OpenAI's archive."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            *path, last = name.split(".")
            module: nn.Module = self
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            module.register_parameter(last, nn.Parameter(tensor))
        self.register_buffer("input_resolution", torch.tensor(16))

    def forward(self, x: Tensor) -> Tensor:
        return x


def save_torchscript(tensors: dict[str, Tensor], path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scripting is deprecated, its files are not gone
        torch.jit.save(torch.jit.trace(Scripted(tensors), torch.zeros(1)), str(path))


def clip_forward(tensors: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """OpenAI's vision transformer, every token through the last norm and the projection."""
    t = {name.removeprefix("visual."): tensor for name, tensor in tensors.items()}
    width = t["class_embedding"].shape[0]

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (width,), t[f"{name}.weight"], t[f"{name}.bias"])

    x = F.conv2d(pixels, t["conv1.weight"], stride=4).flatten(2).transpose(1, 2)
    x = torch.cat([t["class_embedding"].expand(len(x), 1, -1), x], 1) + t["positional_embedding"]
    x = norm(x, "ln_pre")
    root = "transformer.resblocks.0."
    h = norm(x, f"{root}ln_1") @ t[f"{root}attn.in_proj_weight"].T + t[f"{root}attn.in_proj_bias"]
    query, key, value = (p.unflatten(-1, (-1, 64)).transpose(1, 2) for p in h.chunk(3, -1))
    mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    x = x + F.linear(mixed, t[f"{root}attn.out_proj.weight"], t[f"{root}attn.out_proj.bias"])
    h = F.linear(norm(x, f"{root}ln_2"), t[f"{root}mlp.c_fc.weight"], t[f"{root}mlp.c_fc.bias"])
    h = h * torch.sigmoid(1.702 * h)
    x = x + F.linear(h, t[f"{root}mlp.c_proj.weight"], t[f"{root}mlp.c_proj.bias"])
    return norm(x, "ln_post") @ t["proj"]


@pytest.mark.parametrize("form", ["state dict", "torchscript", "safetensors"])
def test_every_form_gives_the_same_tower(form: str, world: Any, tmp_path: Path) -> None:
    tensors = world.clip()
    path = tmp_path / ("clip.safetensors" if form == "safetensors" else "clip.pt")
    if form == "safetensors":
        save_file(tensors, path)
    elif form == "torchscript":
        save_torchscript({**tensors, "text_projection": torch.zeros(2, 2)}, path)
    else:
        torch.save(tensors, path)
    tower = read_openai_clip(path)
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = tower.vision_model(pixel_values=pixels).last_hidden_state
        found = tower.visual_projection(tower.vision_model.post_layernorm(hidden))
    torch.testing.assert_close(found, clip_forward(tensors, pixels), rtol=0, atol=2e-5)
    assert tower.config.hidden_act == "quick_gelu"


def test_torchscript_is_read_without_running_it(world: Any, tmp_path: Path) -> None:
    """The numbers are those that `torch.jit.load` finds; its programs may be anything."""
    path, hollow = tmp_path / "clip.pt", tmp_path / "hollow.pt"
    tensors = {n: t.half() for n, t in world.clip().items()}
    save_torchscript(tensors, path)
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(hollow, "w") as copy:
        for name in archive.namelist():
            is_program = "/code/" in name
            copy.writestr(name, b"import os" if is_program else archive.read(name))
    found = read_torchscript(hollow)
    assert found.keys() == {*tensors, "input_resolution"}
    assert all(torch.equal(found[n], t) and found[n].dtype == t.dtype for n, t in tensors.items())


def test_code_in_an_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "evil.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("evil/constants.pkl", b"")
        archive.writestr("evil/data.pkl", b"cposix\nsystem\n(S'true'\ntR.")
    with pytest.raises(CheckpointError, match=r"holds code \(posix.system\)"):
        read_torchscript(path)


def test_a_residual_network_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "RN50.pt"
    torch.save({"visual.layer1.0.conv1.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(CheckpointError, match="is not a CLIP vision encoder of OpenAI"):
        read_openai_clip(path)


def test_mixed_dtypes_become_float32(world: Any) -> None:
    tensors = world.clip()
    tensors["visual.conv1.weight"] = tensors["visual.conv1.weight"].half()
    torch.save(tensors, world.root / "clip.pt")
    model = read_openai_clip(world.root / "clip.pt")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.visual_projection.weight, tensors["visual.proj"].T)


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("proj", lambda t: t.int(), "visual.proj has dtype torch.int32"),
        ("ln_pre.bias", lambda t: t.to(torch.float8_e4m3fn), "has dtype torch.float8"),
        ("ln_pre.bias", lambda t: t * float("nan"), "holds 64 values that are not finite, of 64"),
        ("ln_pre.bias", lambda t: t.double() * 1e300, "not finite in torch.float32, of 64"),
        ("conv1.weight", lambda t: t[0], r"has shape \[3, 4, 4\], expected 4 axes"),
        ("positional_embedding", lambda t: t[0, 0], r"has shape \[\], expected 2 axes"),
        (f"{BLOCK}attn.in_proj_bias", lambda t: t[1:], "expected three times the width in rows"),
        (f"{BLOCK}mlp.c_fc.weight", lambda t: t[:, 0], "that becomes .*fc1.weight has shape"),
    ],
)
def test_tensors_that_no_tower_has(
    name: str, change: Callable[[torch.Tensor], torch.Tensor], says: str, world: Any
) -> None:
    tensors = world.clip()
    tensors[f"visual.{name}"] = change(tensors[f"visual.{name}"])
    torch.save(tensors, world.root / "clip.pt")
    with pytest.raises(CheckpointError, match=says):
        read_openai_clip(world.root / "clip.pt")


@pytest.mark.parametrize("number", ["7", "99999", "9" * 5000])
def test_a_block_of_an_absurd_number(number: str, world: Any) -> None:
    tensors = world.clip()
    tensors[f"visual.transformer.resblocks.{number}.ln_1.weight"] = torch.ones(64)
    torch.save(tensors, world.root / "clip.pt")
    with pytest.raises(CheckpointError, match=r"(resblocks|layers)\.[79]"):
        read_openai_clip(world.root / "clip.pt")
