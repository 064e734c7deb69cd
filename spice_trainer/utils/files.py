"""Files in folders that others write to as well: regular files only, no link followed, nothing changed in place."""

from __future__ import annotations

import errno
import os
import stat
import uuid
from collections.abc import Iterable
from pathlib import Path

# Not on every system; O_NONBLOCK, because opening a FIFO would wait for its other end.
_FLAGS = sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"))


def open_regular(path: str | os.PathLike[str], flags: int = os.O_RDONLY) -> int:
    """Opens a regular file; a link, a FIFO or a device is an `OSError`, and is never waited for."""
    try:
        file = os.open(path, flags | _FLAGS, 0o666)
    except OSError as error:
        if os.path.islink(path):
            raise OSError(errno.ELOOP, f"it is a link, which is not followed: {os.fspath(path)!r}") from error
        raise
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(errno.EINVAL, f"it is no regular file: {os.fspath(path)!r}")
    return file


def read_regular(path: str | os.PathLike[str]) -> bytes:
    """The content of a regular file."""
    with open(open_regular(path), "rb") as file:
        return file.read()


def make_folder(path: Path) -> None:
    """Makes a folder and those above it; a link in its place is an `OSError`."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise OSError(errno.ENOTDIR, f"it is no folder: {os.fspath(path)!r}") from None
    if path.is_symlink():
        raise OSError(errno.ELOOP, f"it is a link, which is not followed: {os.fspath(path)!r}")


def replace_file(path: Path, content: str | bytes | Iterable[bytes]) -> None:
    """Writes a file whole or not at all, also where the machine stops in between."""
    # Not from `tempfile`, whose files only their owner may read.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    content = content.encode("utf-8") if isinstance(content, str) else content
    try:
        with temporary.open("xb") as file:
            file.writelines([content] if isinstance(content, bytes) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
