"""One run writes to a folder at a time: a lock that the system releases when the process ends, however it ends."""

from __future__ import annotations

import json
import os
import socket
import time
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

from spice_trainer.utils.files import open_regular, read_regular
from spice_trainer.utils.logging import printable

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class RunLock:
    """The lock of a run on its records, held through a file that says who holds it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: int | None = None
        _locks.add(self)

    def acquire(self) -> None:
        """Takes the lock; a `RuntimeError` that names the other run if one holds it."""
        self.release()
        file = open_regular(self.path, os.O_RDWR | os.O_CREAT)
        owner = _read_owner(self.path)
        if not _lock(file, owner):
            os.close(file)
            this = "this very " if owner.get("pid") == os.getpid() else ""
            raise RuntimeError(
                printable(
                    f"Another run ({this}process {owner.get('pid')} on {owner.get('host')}, since "
                    f"{owner.get('since')}) writes to {self.path.parent}: two would mix their records and "
                    "checkpoints. Choose another output_dir, or wait until that run has ended."
                )
            )
        self._file = file
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        text = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}) + "\n"
        os.ftruncate(file, 0)
        os.write(file, text.encode())

    def release(self) -> None:
        """Gives the lock back, if it is held."""
        if self._file is not None:
            file, self._file = self._file, None
            # Where the system knows no locks, this tells that nobody writes here.
            with suppress(OSError):
                os.ftruncate(file, 0)
            with suppress(OSError):
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_UN)
            os.close(file)


_locks: weakref.WeakSet[RunLock] = weakref.WeakSet()


def _forget_all() -> None:
    """A forked process, a loader's worker say, must not hold a lock beyond the run's end."""
    for lock in list(_locks):
        if lock._file is not None:
            os.close(lock._file)
            lock._file = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)


def _read_owner(path: Path) -> dict[str, Any]:
    try:
        owner = json.loads(read_regular(path))
    except (OSError, ValueError, RecursionError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _lock(file: int, owner: dict[str, Any]) -> bool:
    """Whether nobody else holds the lock, which then is this process's."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        # A file system without locks: what the file says must do, as far as it can be checked from this machine.
        pid = owner.get("pid")
        if type(pid) is not int or pid <= 0 or pid == os.getpid() or owner.get("host") != socket.gethostname():
            return True
        return not _is_alive(pid)
    return True


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True
