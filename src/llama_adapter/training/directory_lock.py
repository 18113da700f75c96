"""One run at a time writes into a directory: a lock of the operating system on a file in it.

It ends with the process that holds it, however that ends: nothing is left to be cleaned up.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llama_adapter.errors import TrainingError

LOCK = ".lock"
_UNKNOWN_HERE = frozenset({errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK})
"""What file systems without locks answer."""


@contextmanager
def locked(directory: Path) -> Iterator[bool]:
    """Lock a directory within a block; yields False where its file system has no locks.

    Raises TrainingError, with who it is, while another run has locked it.
    """
    path = directory / LOCK
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise TrainingError(f"cannot write {path}: {error.strerror}") from error
    lock = _Lock(descriptor)
    try:
        is_locked = _lock(descriptor, path)
        if is_locked:
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield is_locked
    finally:
        lock.close()


def refuse_locked(directory: Path) -> None:
    """TrainingError, with who it is, where another run has locked the directory."""
    path = directory / LOCK
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:  # never locked, or not ours to write, which is reported when that is tried
        return
    try:
        _lock(descriptor, path, shared=True)  # so that two who look do not refuse one another
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: Path, *, shared: bool = False) -> bool:
    if sys.platform == "win32":  # without flock
        return False
    import fcntl

    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = path.read_text(errors="replace").strip() or "another process"
        raise TrainingError(
            f"{path.parent} is in use: {holder} trains there; wait for it or choose another out="
        ) from error
    except OSError as error:
        if error.errno in _UNKNOWN_HERE:
            return False
        raise TrainingError(f"cannot lock {path}: {error.strerror}") from error
    return True


class _Lock:
    """An open lock file that forked processes close.

    Workers that read data outlive a killed run by seconds, and would keep it locked so long.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor: int | None = descriptor
        if hasattr(os, "register_at_fork"):
            reference = weakref.ref(self)  # what is registered stays so for ever

            def release() -> None:
                if (lock := reference()) is not None:
                    lock.close()

            os.register_at_fork(after_in_child=release)

    def close(self) -> None:
        """Close without unlocking: every process that has the file open shares the lock."""
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None
