"""Reading files that torch wrote, without ever running what is in them.

A `.pth` is a pickle, and a pickle may hold code. Plain files go through torch's own
`weights_only` reader. OpenAI publishes CLIP as a TorchScript archive, which that reader refuses
and `torch.jit.load` would run (its `__setstate__` functions are TorchScript programs with access
to operators that write files). We need numbers only: `read_torchscript` follows the archive's
pickle with a table of five allowed names and everything else inert.
"""

from __future__ import annotations

import pickle
import re
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llama_adapter.errors import CheckpointError

_STORAGES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
}

_DAMAGE = (
    RuntimeError, EOFError, OSError, ValueError, LookupError, AttributeError, TypeError,
    AssertionError, ArithmeticError, struct.error, zlib.error,
)  # fmt: skip
"""What unpickling flipped bytes may end in: any step of it can meet any value."""


def read_torch_file(path: Path, *, mmap: bool = False) -> Any:
    """The object in a file of `torch.save`: tensors in plain containers and nothing else.

    With `mmap` numbers stay on disk until they are looked at, where the format allows it.
    Raises CheckpointError for a file that is missing, damaged or holds code.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    try:
        # files from before torch 1.6 are no zip archives and cannot be mapped
        can_map = mmap and zipfile.is_zipfile(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=can_map)
    except pickle.UnpicklingError as error:
        code = re.search(r"(?:Unsupported global: GLOBAL|GLOBAL) (\S+)", str(error))
        if code is not None:
            raise CheckpointError(
                f"{path} holds code ({code[1]}), not only tensors; it was not loaded"
            ) from error
        raise CheckpointError(_damaged(path, error)) from error
    except _DAMAGE as error:
        if "PytorchStreamReader" in str(error) or zipfile.is_zipfile(path):
            raise CheckpointError(_damaged(path, error)) from error
        raise CheckpointError(
            f"{path} is truncated or was not written by torch.save "
            f"({path.stat().st_size} bytes: {_first_line(error)})"
        ) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors by name of a `.safetensors` file, a state dict, or a TorchScript archive.

    Raises CheckpointError for anything else.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise CheckpointError(_damaged(path, error)) from error
    if is_torchscript(path):
        return read_torchscript(path)
    content = read_torch_file(path)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected tensors by name")
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}


def is_torchscript(path: Path) -> bool:
    """Whether the file is an archive of `torch.jit.save`, as OpenAI publishes CLIP."""
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, *_DAMAGE) as error:
        raise CheckpointError(_damaged(path, error)) from error


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Parameters and buffers of a TorchScript archive by name; none of its programs run."""
    try:
        with zipfile.ZipFile(path) as archive:
            pickles = [n for n in archive.namelist() if re.fullmatch(r"[^/]+/data\.pkl", n)]
            if len(pickles) != 1:
                raise CheckpointError(f"{path} is no TorchScript archive: data.pkl is missing")
            root = pickles[0].removesuffix("data.pkl")
            with archive.open(pickles[0]) as file:
                module = _InertUnpickler(file, archive=archive, root=root, path=path).load()
    except (zipfile.BadZipFile, pickle.UnpicklingError, *_DAMAGE) as error:
        raise CheckpointError(_damaged(path, error)) from error
    return dict(_tensors_of(module, prefix=""))


class _Inert:
    """Stands for any object of an archive: keeps its state, does nothing."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _InertUnpickler(pickle.Unpickler):
    """Follows a TorchScript archive's pickle; refuses every name it does not know."""

    def __init__(self, file: Any, *, archive: zipfile.ZipFile, root: str, path: Path) -> None:
        super().__init__(file)
        self.archive = archive
        self.root = root
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return _Inert
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch._utils" and name == "_rebuild_tensor_v2":
            return _rebuild_tensor
        if module == "torch.jit._pickle":
            return _first_argument
        raise CheckpointError(
            f"{self.path} holds code ({module}.{name}), not only tensors; it was not loaded"
        )

    def persistent_load(self, pid: Any) -> Tensor:
        _, dtype, key, _, _ = pid
        content = self.archive.read(f"{self.root}data/{key}")
        if not content:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(bytearray(content), dtype=dtype)


def _rebuild_tensor(
    storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> Tensor:
    return storage.as_strided(size, stride, offset)


def _first_argument(value: Any, *_: Any) -> Any:
    return value


def _tensors_of(module: Any, *, prefix: str) -> Iterator[tuple[str, Tensor]]:
    state = module.state if isinstance(module, _Inert) else module
    if isinstance(state, dict):
        for name, value in state.items():
            if isinstance(value, Tensor):
                yield f"{prefix}{name}", value
            else:
                yield from _tensors_of(value, prefix=f"{prefix}{name}.")


def _damaged(path: Path, error: Exception) -> str:
    return f"{path} is truncated or damaged ({path.stat().st_size} bytes: {_first_line(error)})"


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0][:160] if lines else type(error).__name__
