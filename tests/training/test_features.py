"""Features of images kept on disk: the same losses, and an encoder that runs once an image."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from llama_adapter.conversation import ImageRef
from llama_adapter.data import feature_cache
from llama_adapter.data.feature_cache import Computed, FeatureCache
from llama_adapter.errors import DataError, TrainingError
from llama_adapter.training import features
from llama_adapter.training.build import build, load_processor
from llama_adapter.training.callbacks import silent
from llama_adapter.training.launch import train
from llama_adapter.training.recipe import Recipe, load_recipe
from llama_adapter.training.run import TrainingRun
from llama_adapter.training.streams import open_data

Write = Callable[..., Path]
CACHED = "vision.cache_features=true"


def loaded(path: Path, *overrides: str) -> Recipe:
    return load_recipe(path, overrides)


def images_of(root: Path) -> int:
    paths = root.rglob("*.safetensors")
    headers = [feature_cache.read_header(path) for path in paths]
    return sum(len(json.loads(header.metadata["images"])) for header in headers)


@pytest.mark.parametrize("padding", ["packed", "padded"])
@pytest.mark.parametrize("workers", [0, 2])
def test_training_from_features_learns_the_same(
    padding: str, workers: int, recipe_file: Write, losses: Any, tmp_path: Path
) -> None:
    path = recipe_file(
        steps=3,
        data={"workers": workers, "padding": padding},
        evaluation={"every": 3, "samples": 4},
    )
    runs = {
        name: train(loaded(path, f"out={tmp_path}/{name}", "captions.sources.0.held_out=4", *more))
        for name, more in {
            "plain": (),
            "cached": (CACHED, "vision.cache_dtype=float32"),
            "half": (CACHED,),
        }.items()
    }
    plain, cached, half = (losses(tmp_path / name) for name in runs)
    for before, after, rounded in zip(plain, cached, half, strict=True):
        for name, value in before.items():
            if isinstance(value, float):
                assert after[name] == pytest.approx(value, rel=1e-6), name
                assert rounded[name] == pytest.approx(value, rel=2e-3), name
    assert images_of(tmp_path / "cached/cache") == 24


def test_features_in_float16_are_evaluated_under_autocast(
    recipe_file: Write, losses: Any, tmp_path: Path
) -> None:
    path = recipe_file(
        steps=1, evaluation={"every": 1, "samples": 4}, compute={"autocast": "bfloat16"}
    )
    scores = {}
    for name, more in {"plain": (), "cached": (CACHED,)}.items():
        train(loaded(path, f"out={tmp_path}/{name}", "captions.sources.0.held_out=4", *more))
        row = losses(tmp_path / name)[-1]
        scores[name] = {k: v for k, v in row.items() if k.endswith("perplexity")}
    assert scores["plain"]
    assert scores["cached"] == pytest.approx(scores["plain"], rel=0.02)


def test_with_a_whole_cache_nothing_is_decoded_and_the_encoder_rests(
    recipe_file: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe_file(vision__cache_features=True, vision__cache_folder=str(tmp_path / "shared"))
    whole = train(loaded(path, f"out={tmp_path}/first"))

    def refuse(*_args: Any, **_options: Any) -> Any:
        raise AssertionError("an image was decoded, or looked at")

    monkeypatch.setattr(features, "vision_features", refuse)
    monkeypatch.setattr("llama_adapter.processing.prompts.load_image", refuse)
    monkeypatch.setattr("llama_adapter.data.feature_cache._digest", refuse)
    again = train(loaded(path, f"out={tmp_path}/second"))
    assert again.checksum == whole.checksum


def test_a_kill_costs_what_was_not_written(
    recipe_file: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "_SAMPLES", 5)
    monkeypatch.setattr(features, "_FILE_BYTES", 1)
    path = recipe_file(vision__cache_features=True, steps=1)
    seen: list[int] = []
    encode = features._encoded

    def die(decoded: Any, model: Any) -> Any:
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(len(decoded))
        return encode(decoded, model)

    monkeypatch.setattr(features, "_encoded", die)
    with pytest.raises(KeyboardInterrupt):
        train(loaded(path))
    assert images_of(tmp_path / "run/cache") == 10
    seen.clear()
    monkeypatch.setattr(
        features, "_encoded", lambda *given: seen.append(len(given[0])) or encode(*given)
    )
    train(loaded(path))
    assert sum(seen) == 14
    assert images_of(tmp_path / "run/cache") == 24


class Rank:
    """One of two processes, the other of which is played back."""

    world_size = 2

    def __init__(self, rank: int, said: list[Any]) -> None:
        self.rank, self.said = rank, said

    def all_reduce(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def gather(self, value: Any) -> list[Any]:
        if self.rank == 0:
            self.said.append(value)
            return [value, value]
        return [self.said.pop(0), value]


def test_every_process_computes_a_share(recipe_file: Write, tmp_path: Path) -> None:
    recipe = loaded(recipe_file())
    processor = load_processor(recipe)
    data = open_data(recipe, processor)
    model = build(recipe, device=torch.device("cpu")).model
    assert recipe.vision is not None
    said: list[Any] = []
    for rank, count in ((0, 12), (1, 24)):
        cache = features.open_cache(recipe.vision, model, processor, folder=tmp_path)
        features.fill_cache(
            cache, data.sources, model, processor,
            communicator=Rank(rank, said), workers=0, progress=silent,
        )  # fmt: skip
        assert images_of(tmp_path) == count


def test_an_image_is_known_by_its_content(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path / "cache", dtype=torch.float16)
    image, copy = tmp_path / "a.png", tmp_path / "copy.png"
    Image.new("RGB", (8, 8), (200, 10, 10)).save(image)
    shutil.copy(image, copy)
    ref, same = ImageRef.of(image), ImageRef.of(image.read_bytes())
    assert cache.key(ref) == cache.key(ImageRef.of(copy)) == cache.key(same)
    values = torch.randn(4, 6)
    video = torch.randn(3, 4, 6)
    clip = ImageRef(source=(Image.new("RGB", (8, 8)),) * 3)
    cache.add([Computed(cache.key(ref), 0, values), Computed(cache.key(clip), 3, video)])
    cache.remember_files()
    found = FeatureCache(cache.folder, dtype=torch.float16)
    assert torch.equal(found.read([ref, same]), values.half().float().expand(2, 4, 6))
    assert torch.equal(found.read([clip]), video.half().float()[None])
    assert found.read([ref, clip]).shape == (2, 3, 4, 6)
    Image.new("RGB", (9, 9)).save(image)
    with pytest.raises(DataError, match=r"a.png has changed since its features were computed"):
        found.read([ref])
    with pytest.raises(TrainingError, match=r"set vision.cache_dtype to float32"):
        cache.add([Computed("big", 0, values * 1e9)])


def test_damaged_features_are_computed_again(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, dtype=torch.float32)
    cache.add([Computed("one", 0, torch.ones(2, 3))])
    [path] = tmp_path.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.warns(UserWarning, match="computed again: .*damaged"):
        assert "one" not in FeatureCache(tmp_path, dtype=torch.float32)


@pytest.mark.parametrize("damaged", ["[]", '{"a"'])
def test_what_was_remembered_of_files_is_no_reason_to_end(damaged: str, tmp_path: Path) -> None:
    """It saves reading images again."""
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    ref = ImageRef(source=tmp_path / "a.png", name="it")
    folder = tmp_path / "cache"
    cache = FeatureCache(folder, dtype=torch.float32)
    key = cache.key(ref)
    cache.remember_files()
    (folder / "files.json").write_text(damaged)
    with pytest.warns(UserWarning, match="images are read again for their keys"):
        assert FeatureCache(folder, dtype=torch.float32).key(ref) == key


def test_another_encoder_or_dtype_has_another_folder(recipe_file: Write, tmp_path: Path) -> None:
    def folder(*overrides: str) -> Path:
        recipe = loaded(recipe_file(), *overrides)
        model = build(recipe, device=torch.device("cpu")).model
        assert recipe.vision is not None
        processor = load_processor(recipe)
        return features.open_cache(recipe.vision, model, processor, folder=tmp_path).folder

    found = {
        folder(),
        folder("vision.cache_dtype=float32"),
        folder("vision.random_weights=true"),
        folder("adapter.vision_feature=0"),
    }
    assert len(found) == 4
    assert folder() in found


@pytest.mark.parametrize("cached", [False, True])
def test_dropped_channels_and_split_rows_go_on_to_the_bit(
    cached: bool, recipe_file: Write, losses: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe_file(
        steps=4,
        vision__feature_dropout=0.3,
        vision__cache_features=cached,
        data={
            "workers": 0, "padding": "padded", "split_by_length": True, "group_by_length": True
        },
        compute={"autocast": "auto"},
    )  # fmt: skip
    whole = train(loaded(path, f"out={tmp_path}/whole"))
    step = TrainingRun._step

    class Stop(Exception):
        pass

    def stop(self: TrainingRun) -> Any:
        if self.trainer.step_count == 3:
            raise Stop
        return step(self)

    with monkeypatch.context() as patched:
        patched.setattr(TrainingRun, "_step", stop)
        with pytest.raises(Stop):
            train(loaded(path, f"out={tmp_path}/parts"))
    parts = train(loaded(path, f"out={tmp_path}/parts"), resume=True)
    assert parts.started_at == 2
    assert parts.checksum == whole.checksum
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
