"""What the self-check remembers on disk: what passed, and what was being checked when a process died.

Only passes are remembered, each in a file that appears at once and whole. What is checked now stands in a file for each
process, which that process holds locked: the system frees the lock when the process dies, on another rank or in another
container as well. A folder that cannot be written is no error: then nothing is remembered.
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
"""Seconds after which a check counts as ended by a death, on a file system that cannot say by a lock."""


def folder() -> Path:
    """Where checks are remembered: what the environment says, else in the user's cache."""
    if given := os.environ.get(VARIABLE):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "node_cuda"


class Lost(RuntimeError):
    """The device cannot be used any more in this process."""


class Record:
    """Of one build of the kernels on one kind of device. facts: all that the result of a check depends on."""

    def __init__(self, facts: str) -> None:
        self.facts = facts
        self.folder = folder()
        self._key = hashlib.sha256(facts.encode()).hexdigest()[:16]

    def file_of(self, dtype: str) -> Path:
        """Where it stands that the kernels passed in this dtype."""
        return self.folder / f"{self._key}.{dtype}.passed"

    def passed(self, dtype: str) -> bool:
        """Did the kernels pass in this dtype? A file that says anything else was damaged, and counts as none."""
        try:
            return self.file_of(dtype).read_bytes() == self._content(dtype)
        except OSError:
            return False

    def remember(self, dtype: str) -> None:
        """They passed."""
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
        """What dead processes checked, a primitive and its dtype, and the files that say so: an error of the device
        killed them, or a kernel did not end. What running processes check is left out."""
        found = []
        with contextlib.suppress(OSError):
            for path in sorted(self.folder.glob(f"{self._key}.*.checking")):
                with contextlib.suppress(OSError), path.open("rb") as file:
                    if _abandoned(file.fileno()) and (what := file.read().decode(errors="replace").strip()):
                        found.append((what, path))
        return found

    @contextlib.contextmanager
    def checking(self) -> Iterator[Callable[[str], None]]:
        """While a check runs: gives a function that writes what is checked from now on, which outlives the process
        without a wait for the disk. Nothing is left of it, unless the check ends by `Lost`."""
        handle, name = -1, ""
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.folder, prefix=f"{self._key}.", suffix=".checking")
            if fcntl is not None:
                fcntl.flock(handle, fcntl.LOCK_EX)  # before anything stands in it; some file systems have no locks

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
                with contextlib.suppress(OSError):  # Windows removes no open file; others see no file without its lock
                    end()


def _abandoned(handle: int) -> bool:
    """Does no process hold this file locked?"""
    try:
        if fcntl is None:
            raise OSError
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return time.time() - os.fstat(handle).st_mtime > LONGEST_CHECK
    return os.fstat(handle).st_nlink > 0  # 0: its process has just removed it
