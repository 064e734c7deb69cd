"""A record file while it grows, and its copies in checkpoints: segments, which are never written to again.

    spice/selections.jsonl                                        the file, appended to
    checkpoint-4/spice/records/selections.000000000000.jsonl      its bytes from 0 on
    checkpoint-4/spice/records/selections.000000310482.jsonl      and those from 310,482 on

A checkpoint has to be complete where it is moved to, and when the others are gone; yet to copy all records into each
makes a run's bytes grow with the square of its steps. So a segment of at least `SEALED_BYTES` is written once, and
later checkpoints link to it (hard links; where the file system has none, or the earlier checkpoint is gone, it is
copied). What is shorter is written anew into the next checkpoint, together with what came since. A checkpoint thus
writes what is new and at most `SEALED_BYTES` more of each file, and removing one takes nothing from another. The
growing file itself is never linked, because a link would show what is appended or cut later.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from itertools import takewhile
from pathlib import Path
from typing import Any

from spice_trainer.utils.files import open_regular, replace_file

SEALED_BYTES = 2**18
_BLOCK = 2**20
_SEGMENT = re.compile(r"(\w+)\.(\d{12,15})\.jsonl")


@dataclass(frozen=True)
class Segment:
    """A part of a record file that lies in a checkpoint."""

    name: str
    start: int
    size: int
    identity: tuple[int, int, int]

    @classmethod
    def of(cls, path: Path, start: int) -> Segment:
        """The segment that a file holds."""
        found = path.lstat()
        return cls(path.name, start, found.st_size, (found.st_dev, found.st_ino, found.st_mtime_ns))

    def link(self, earlier: Path | None, folder: Path) -> bool:
        """Links it from an earlier checkpoint's folder; whether that gave this very file."""
        target = folder / self.name
        if earlier is None:
            return False
        try:
            os.link(earlier / self.name, target, follow_symlinks=False)
        except (OSError, NotImplementedError):
            return False
        if Segment.of(target, self.start) == self:
            return True
        target.unlink()
        return False


class RecordFile:
    """One record file, open: its lines can be read again also where its name was deleted, or leads elsewhere.

    What could not be written waits in memory for the next attempt.
    """

    def __init__(self, path: Path, file: int, digest: Any = None) -> None:
        self.path = path
        self.segments: list[Segment] = []
        self.unwritten = b""
        self._file = FileIO(file, "rb+")
        self._digest = hashlib.sha256() if digest is None else digest
        # Of what is sealed; not known of a file that was reopened, until more is.
        self._sealed = hashlib.sha256() if digest is None else None
        self._written = os.fstat(file).st_size

    @classmethod
    def create(cls, path: Path) -> RecordFile:
        """A new file; an `OSError` where something lies under its name."""
        return cls(path, open_regular(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL))

    @classmethod
    def reopen(cls, path: Path, size: int, sha256: str) -> RecordFile | None:
        """The file as it was at this length; `None` if it holds other bytes, or is not this run's alone.

        It is cut to that length by [`RecordFile.cut`].
        """
        try:
            file = open_regular(path, os.O_RDWR | os.O_APPEND)
        except OSError:
            return None
        digest = hashlib.sha256()
        with os.fdopen(os.dup(file), "rb") as content:
            rest = size
            while rest and (block := content.read(min(_BLOCK, rest))):
                digest.update(block)
                rest -= len(block)
        if rest or digest.hexdigest() != sha256 or os.fstat(file).st_nlink > 1:
            os.close(file)
            return None
        return cls(path, file, digest)

    @property
    def size(self) -> int:
        """Bytes recorded."""
        return self._written + len(self.unwritten)

    @property
    def sha256(self) -> str:
        """Checksum of what was recorded."""
        return self._digest.hexdigest()

    def append(self, content: bytes) -> None:
        """Records more bytes, and writes them."""
        self._digest.update(content)
        self.unwritten += content
        self.flush()

    def flush(self) -> None:
        """Writes what is not written yet, without a buffer, so that an error leaves the file a beginning of it all."""
        while self.unwritten:
            count = self._file.write(self.unwritten)
            self._written += count
            self.unwritten = self.unwritten[count:]

    def cut(self, size: int) -> None:
        """Removes what lies beyond a length."""
        os.ftruncate(self._file.fileno(), size)
        self._written = size

    def is_in_place(self) -> bool:
        """Whether the file's name still leads to it, or to one of the same length on a system that renumbers files."""
        try:
            found, own = self.path.lstat(), os.fstat(self._file.fileno())
        except OSError:
            return False
        return os.path.samestat(found, own) or found.st_size == own.st_size

    def is_altered(self) -> bool:
        """Whether somebody else wrote to it, or cut it, as an editor does that saves in place."""
        return os.fstat(self._file.fileno()).st_size != self._written

    def put_back(self) -> None:
        """Writes the whole file anew under its name, and goes on there."""
        replace_file(self.path, self.read(0))
        file = open_regular(self.path, os.O_RDWR | os.O_APPEND)
        self._file.close()
        self._file, self._written, self.unwritten = FileIO(file, "rb+"), self.size, b""

    def read(self, start: int, end: int | None = None) -> Iterator[bytes]:
        """What was recorded from one byte to another, in blocks."""
        end = self.size if end is None else end
        at, written = start, min(end, self._written)
        while at < written:
            self._file.seek(at)
            block = self._file.read(min(_BLOCK, written - at))
            if not block:
                raise OSError(errno.EIO, f"bytes of {self.path.name} are gone, which were written")
            yield block
            at += len(block)
        yield self.unwritten[max(start - self._written, 0) : max(end - self._written, 0)]

    def save(self, folder: Path, earlier: Path | None) -> bool:
        """Gives a checkpoint's folder all that was recorded; `earlier` is that of the checkpoint before it.

        Whether these are the bytes that were recorded, as far as they were not sealed before: somebody may have
        written over them.
        """
        is_intact, digest = True, None if self._sealed is None else self._sealed.copy()
        segments: list[Segment] = []
        for segment in self.segments:
            if not segment.link(earlier, folder):
                replace_file(folder / segment.name, self.read(segment.start, segment.start + segment.size))
                segment = Segment.of(folder / segment.name, segment.start)
            segments.append(segment)
        start = sum(segment.size for segment in segments)
        if start < self.size or not segments:
            path = folder / f"{self.path.stem}.{start:012}.jsonl"
            replace_file(path, _digested(self.read(start), digest))
            is_intact = digest is None or digest.digest() == self._digest.digest()
            if self.size - start >= SEALED_BYTES:
                segments.append(Segment.of(path, start))
                self._sealed = self._digest.copy()
        self.segments = segments
        return is_intact

    def find_sealed(self, folder: Path) -> None:
        """Takes a checkpoint's segments of this file as its own, if they hold just what was recorded."""
        with suppress(ValueError):
            for _ in read_segments(folder, self.path.name, self.size, self.sha256):
                pass
            found = (Segment.of(path, start) for start, path in _find_segments(folder, self.path.name))
            self.segments = list(takewhile(lambda segment: segment.size >= SEALED_BYTES, found))
            self._sealed = None if self.segments else hashlib.sha256()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _digested(blocks: Iterator[bytes], digest: Any) -> Iterator[bytes]:
    for block in blocks:
        if digest is not None:
            digest.update(block)
        yield block


def read_segments(folder: Path, name: str, size: int, sha256: str) -> Iterator[bytes]:
    """The bytes of a file from its segments in a checkpoint; a `ValueError` if they are not just these."""
    digest, end = hashlib.sha256(), 0
    try:
        for start, path in _find_segments(folder, name):
            if start != end:
                raise ValueError(f"the bytes of {name} from {end:,} on are missing")
            with open(open_regular(path), "rb") as file:
                while block := file.read(_BLOCK):
                    digest.update(block)
                    end += len(block)
                    yield block
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error}") from error
    if (end, digest.hexdigest()) != (size, sha256):
        raise ValueError(f"{name} has other bytes than were written: {end:,} instead of {size:,}, or another checksum")


def _find_segments(folder: Path, name: str) -> list[tuple[int, Path]]:
    matches = [(_SEGMENT.fullmatch(path.name), path) for path in folder.iterdir()]
    return sorted((int(match[2]), path) for match, path in matches if match and f"{match[1]}.jsonl" == name)
