"""The record of the self-check on disk: the checks that passed, and the check that ran when a process died.

Only passes are remembered. Each is a file that is written in one operation, so that it is never read half written. Each
process writes its current check into a file that it keeps locked. The system frees the lock when the process dies, also
for another rank or container. If the folder cannot be written, nothing is remembered, and no error is raised.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

VARIABLE = "NODE_CUDA_CACHE"

LONGEST_CHECK = 60.0
"""Seconds after which an unfinished check counts as a death, on a file system without locks."""


def folder() -> Path:
    """Return the folder of the records: from the environment, else in the user's cache."""
    if given := os.environ.get(VARIABLE):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "node_cuda"


class Lost(RuntimeError):
    """This process cannot use the device any more."""


class Record:
    """The record of one build of the kernels on one kind of device. facts: everything that a result depends on."""

    def __init__(self, facts: str) -> None:
        self.facts = facts
        self.folder = folder()
        self._key = hashlib.sha256(facts.encode()).hexdigest()[:16]

    def file_of(self, dtype: str) -> Path:
        """Return the file that says that the kernels passed in this dtype."""
        return self.folder / f"{self._key}.{dtype}.passed"

    def passed(self, dtype: str) -> bool:
        """Return whether the kernels passed in this dtype. A file with any other text is damaged and does not count."""
        try:
            return self.file_of(dtype).read_bytes() == self._content(dtype)
        except OSError:
            return False

    def remember(self, dtype: str) -> None:
        """Record that the kernels passed in this dtype."""
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.folder, suffix=".tmp")
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(self._content(dtype))
                os.replace(name, self.file_of(dtype))
            except OSError:
                os.unlink(name)

    def _content(self, dtype: str) -> bytes:
        return f"{self.facts}\nThe kernels passed the self-check in {dtype}.\n".encode()

    def unfinished(self) -> list[tuple[str, Path]]:
        """Return the checks of dead processes, as (primitive and dtype, file).

        A device error killed such a process, or a kernel did not end. The checks of running processes are not included.
        """
        found = []
        with contextlib.suppress(OSError):
            for path in sorted(self.folder.glob(f"{self._key}.*.checking")):
                with contextlib.suppress(OSError), path.open("rb") as file:
                    if _abandoned(file.fileno()) and (what := file.read().decode(errors="replace").strip()):
                        found.append((what, path))
        return found

    @contextlib.contextmanager
    def checking(self) -> Iterator[Callable[[str], None]]:
        """Yield a function that writes down what is checked from now on.

        The text survives the death of the process, without a wait for the disk. At the end the file is removed, unless
        the check ends by `Lost`.
        """
        handle, name = -1, ""
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.folder, prefix=f"{self._key}.", suffix=".checking")
            if fcntl is not None:
                fcntl.flock(handle, fcntl.LOCK_EX)  # before it has any text; some file systems have no locks

        def note(what: str) -> None:
            with contextlib.suppress(OSError):
                os.lseek(handle, 0, os.SEEK_SET)
                os.write(handle, what.ljust(80).encode())

        try:
            yield note
        except Lost:
            name = ""
            raise
        finally:
            for end in (lambda: os.unlink(name), lambda: os.close(handle), lambda: os.unlink(name)):
                # Windows does not remove open files; on other systems a file without its lock is not read
                with contextlib.suppress(OSError):
                    end()


def _abandoned(handle: int) -> bool:
    """Return whether no process holds a lock on this file."""
    try:
        if fcntl is None:
            raise OSError
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return time.time() - os.fstat(handle).st_mtime > LONGEST_CHECK
    return os.fstat(handle).st_nlink > 0  # 0: its process has just removed it
