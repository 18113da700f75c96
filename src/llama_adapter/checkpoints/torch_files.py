"""Reading files that torch wrote, without ever running what is in them.

A `.pth` is a pickle, and a pickle may hold code. Plain files go through torch's own
`weights_only` reader. OpenAI publishes CLIP as a TorchScript archive, which that reader refuses
and `torch.jit.load` would run (its `__setstate__` functions are TorchScript programs with access
to operators that write files). We need values only: `read_torchscript` follows the archive's
pickle with a table of five allowed names and everything else inert.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
import struct
import warnings
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llama_adapter.errors import CheckpointError
from llama_adapter.files import open_regular

_ZIP_MAGIC = b"PK\x03\x04"
_CHUNK = 1 << 20
_MOST_EXPANSION, _EXPANSION_FLOOR = 4, 1 << 26
"""Tensors may repeat the values of the file (shared, expanded) so often, and so many bytes more."""

_STORAGES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ShortStorage": torch.int16,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "QInt8Storage": torch.qint8,
    "QUInt8Storage": torch.quint8,
    "QInt32Storage": torch.qint32,
}

_DAMAGE = (
    RuntimeError, EOFError, OSError, ValueError, LookupError, AttributeError, TypeError,
    AssertionError, ArithmeticError, MemoryError, struct.error, zlib.error,
)  # fmt: skip
"""What unpickling flipped bytes may end in: any step of it can meet any value."""


INERT = ("argparse.Namespace", "pathlib.PosixPath", "pathlib.WindowsPath")
"""Classes that training scripts store with their tensors: the settings they ran with."""


class Inert:
    """Replaces an object of another class in a file: takes anything, keeps and does nothing."""

    __slots__ = ()

    def __new__(cls, *_: Any) -> Inert:
        return super().__new__(cls)

    def __call__(self, *_: Any) -> Inert:
        return self

    def __setstate__(self, state: Any) -> None:
        """Forget the state."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Forget the entry."""

    def extend(self, values: Any) -> None:
        """Forget the values."""


def read_torch_file(path: Path, *, mmap: bool = False, inert: Iterable[str] = ()) -> Any:
    """The object in a file of `torch.save`: dense tensors in plain containers and nothing else.

    Checksums, and the sizes of all storages, are compared before anything is read. With `mmap`
    tensors stay on disk until they are looked at, where the format allows it, and only the
    checksums of what is read now are checked: `check_archive` checks the others. Objects of the
    classes named in `inert` come back as `Inert`.
    Raises CheckpointError for a file that is missing, damaged, or holds code or odd tensors.
    """
    check_archive(path, with_data=not mmap)
    content = _load(path, inert, mmap=mmap and is_archive(path))
    _check_tensors(path, content)
    return content


def is_archive(path: Path) -> bool:
    """Whether a file begins as an archive. Those from before torch 1.6 do not."""
    if not path.exists():
        raise CheckpointError(f"{path} is missing")
    with open_regular(path, error=CheckpointError) as file:
        return file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC


def check_archive(path: Path, *, with_data: bool = True) -> None:
    """Compare the checksums of an archive of `torch.save`, and its storages with its members.

    `with_data` false leaves out the checksums of the tensors' values. Raises CheckpointError for
    a damaged archive, and for compressed members, which torch does not write and cannot map.
    Files from before torch 1.6 are not archives and have nothing to compare.
    """
    if not is_archive(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            _check_members(path, members)
            for member in members:
                if with_data or "/data/" not in member.filename:
                    _check_member(archive, member)
            _Outline.check(path, archive)
    except (zipfile.BadZipFile, pickle.UnpicklingError, *_DAMAGE) as error:
        raise CheckpointError(_damaged(path, error)) from error


def _check_members(path: Path, members: list[zipfile.ZipInfo]) -> None:
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
            raise CheckpointError(
                f"{path}: member {member.filename} is compressed or its sizes disagree "
                f"({member.compress_size} bytes for {member.file_size}), which torch.save "
                "never writes"
            )
    size, found = path.stat().st_size, sum(member.file_size for member in members)
    if found > size or len({member.filename.lower() for member in members}) < len(members):
        raise CheckpointError(
            f"{path} is damaged: its members overlap ({found} bytes in a file of {size})"
        )

    # torch.serialization.set_crc32_options(False) leaves all checksums 0; zipfile then skips them
    if not any(member.CRC for member in members if member.file_size):
        for member in members:
            del member.CRC


def _check_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    """Read a member to its end, where zipfile compares the checksum."""
    with archive.open(member) as file:
        while file.read(_CHUNK):
            pass


def _load(path: Path, inert: Iterable[str], **options: Any) -> Any:
    substitutes: list[Any] = [(Inert, name) for name in inert]
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(substitutes):
            warnings.simplefilter("ignore")  # what torch makes of damage is refused or equal
            return torch.load(path, **{"map_location": "cpu", "weights_only": True, **options})
    except pickle.UnpicklingError as error:
        code = re.search(r"(?:[Uu]nsupported global: GLOBAL|GLOBAL) (\S+)", str(error))
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


def _check_tensors(path: Path, content: Any) -> None:
    """Refuse what is not a dense tensor with values of its own."""
    tensors = []
    for name, value in _leaves(content):
        if isinstance(value, torch.TypedStorage | torch.UntypedStorage):
            raise CheckpointError(f"{path}: {name} is a bare storage, expected a tensor")
        if not isinstance(value, Tensor):
            continue
        if value.layout is not torch.strided or value.is_quantized or value.is_nested:
            raise CheckpointError(
                f"{path}: {name} is a sparse, quantized or nested tensor, expected a dense one"
            )
        if value.is_meta:
            raise CheckpointError(f"{path}: tensor {name} has no values (it is a meta tensor)")
        tensors.append(value)
    _check_expansion(path, tensors)


def _check_expansion(path: Path, tensors: Iterable[Tensor]) -> None:
    """A tensor of stride 0 may be of any size: refuse what would take far more than the file."""
    size = path.stat().st_size
    written_out = sum(tensor.numel() * tensor.itemsize for tensor in tensors)
    if written_out > _MOST_EXPANSION * size + _EXPANSION_FLOOR:
        raise CheckpointError(
            f"{path} is damaged: its tensors would take {written_out} bytes, the file has {size}"
        )


def _leaves(content: Any) -> Iterator[tuple[str, Any]]:
    """What the nested containers of a file hold, by its place in them."""
    waiting, seen = [("", content)], set()
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, dict | list | tuple | set):
            if id(value) in seen:
                continue
            seen.add(id(value))
            inner = value.items() if isinstance(value, dict) else enumerate(value)
            waiting += [(f"{name}.{key}" if name else str(key), part) for key, part in inner]
        else:
            yield name, value


_LONGEST_NAME = 300

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Dtypes of weights; float8 needs scales that no file of these layouts holds."""


def state_dict(path: Path, content: Any) -> dict[str, Tensor]:
    """Tensors by name, plain and without gradients; CheckpointError for any other content."""
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected tensors by name")
    for name, value in content.items():
        if not is_name(name) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path}: {name!r:.80} is a {type(value).__name__}, expected tensors by name"
            )
    return {name: value.detach().resolve_neg() for name, value in content.items()}


def is_name(value: Any) -> bool:
    """Whether a value can be a tensor's name: text of one line and some length."""
    return isinstance(value, str) and value.isprintable() and len(value) <= _LONGEST_NAME


def why_not_float(tensor: Tensor) -> str | None:
    """Why a tensor cannot be a weight; None if it can."""
    if tensor.dtype in FLOATS:
        return None
    return f"has dtype {tensor.dtype}, expected {', '.join(str(dtype) for dtype in FLOATS)}"


def why_not_finite(tensor: Tensor, dtype: torch.dtype) -> str | None:
    """Why a tensor's values cannot be used in a dtype; None if they can. Reads them once."""
    if not tensor.numel():
        return None
    low, high = torch.aminmax(tensor)  # NaN if any value is
    if bool(torch.stack([low, high]).to(dtype).isfinite().all()):
        return None
    count, where = int((~tensor.isfinite()).sum()), ""
    if not count:
        count, where = int((~tensor.to(dtype).isfinite()).sum()), f" in {dtype}"
    return f"holds {count} values that are not finite{where}, of {tensor.numel()}"


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
            root = _root(path, archive)
            # programs may be compressed, values and their pickle never are
            needed = [m for m in archive.infolist() if m.filename.startswith(f"{root}data")]
            _check_members(path, needed)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tensors = dict(_tensors_of(_Values(path, archive).load(), prefix=""))
    except (zipfile.BadZipFile, pickle.UnpicklingError, *_DAMAGE) as error:
        raise CheckpointError(_damaged(path, error)) from error
    _check_expansion(path, tensors.values())
    return tensors


def _root(path: Path, archive: zipfile.ZipFile) -> str:
    """The folder of an archive in which everything is."""
    pickles = [n for n in archive.namelist() if re.fullmatch(r"[^/]+/data\.pkl", n)]
    root = pickles[0].removesuffix("data.pkl") if pickles else "/"
    if not all(name.startswith(root) for name in archive.namelist()):
        raise CheckpointError(
            f"{path} is not an archive of torch: data.pkl is missing, or not alone"
        )
    return root


def _check_memo(path: Path, pickled: bytes) -> None:
    """CPython's unpickler allocates as many places as the largest number of one says."""
    for operation, argument, _ in pickletools.genops(pickled):
        if operation.name in ("PUT", "LONG_BINPUT") and int(argument or 0) > len(pickled):
            raise CheckpointError(f"{path} is damaged: its pickle has an entry {argument}")


class _Module:
    """Replaces any object of a TorchScript archive: keeps its state, does nothing."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Rebuild:
    """Makes a tensor of a storage. An object without attributes, which no pickle can change."""

    __slots__ = ()

    def __call__(
        self, storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
    ) -> Tensor:
        return storage.as_strided(size, stride, offset)


class _FirstArgument:
    """Gives the annotated value of `torch.jit._pickle`'s functions. As `_Rebuild`."""

    __slots__ = ()

    def __call__(self, value: Any, *_: Any) -> Any:
        return value


class _Outline(pickle.Unpickler):
    """Follows an archive's pickle with everything inert, and compares every storage's size."""

    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        self.path, self.archive = path, archive
        self.root = _root(path, archive)
        pickled = archive.read(f"{self.root}data.pkl")
        _check_memo(path, pickled)
        super().__init__(io.BytesIO(pickled))

    @classmethod
    def check(cls, path: Path, archive: zipfile.ZipFile) -> None:
        """Raises CheckpointError for a storage that its member does not exactly fill."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes in damaged text
            cls(path, archive).load()

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        return Inert

    def persistent_load(self, pid: Any) -> Any:
        _, dtype, key, _, count = pid
        if dtype is Inert:  # bytes of a dtype younger than storages with a type
            dtype = torch.uint8
        member = self.archive.getinfo(f"{self.root}data/{key}")
        if type(key) is not str or member.file_size != count * dtype.itemsize:
            raise CheckpointError(
                f"{self.path} is damaged: storage {key} has {member.file_size} bytes, expected "
                f"{count} values of {dtype}"
            )
        return Inert()


class _Values(_Outline):
    """Follows a TorchScript archive's pickle; refuses every name it does not know."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return _Module
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Rebuild()
        if module == "torch.jit._pickle":
            return _FirstArgument()
        raise CheckpointError(
            f"{self.path} holds code ({module}.{name}), not only tensors; it was not loaded"
        )

    def persistent_load(self, pid: Any) -> Tensor:
        super().persistent_load(pid)
        _, dtype, key, _, _ = pid
        content = self.archive.read(f"{self.root}data/{key}")  # compares the checksum
        if not content:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(bytearray(content), dtype=dtype)


def _tensors_of(module: Any, *, prefix: str) -> Iterator[tuple[str, Tensor]]:
    state = module.state if isinstance(module, _Module) else module
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
