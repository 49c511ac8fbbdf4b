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
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

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


UNKNOWN = "something"
"""What was checked, where the file does not say it."""


class Unfinished(NamedTuple):
    """A check that a process did not survive. what: the primitive and its dtype."""

    what: str
    path: Path


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

    def unfinished(self) -> list[Unfinished]:
        """The checks of processes that are dead: killed by an error of the device, or because a kernel did not end.
        Those of running processes are left out."""
        found = []
        with contextlib.suppress(OSError):
            for path in sorted(self.folder.glob(f"{self._key}.*.checking")):
                with contextlib.suppress(OSError), path.open("rb") as file:
                    if _abandoned(file.fileno()) and path.exists():
                        found.append(Unfinished(file.read().decode(errors="replace").strip() or UNKNOWN, path))
        return found

    @contextlib.contextmanager
    def checking(self) -> Iterator[Checking]:
        """While a check runs. Nothing is left of it, unless it ends by `Lost`."""
        now = Checking(self.folder, self._key)
        try:
            yield now
        except Lost:
            now.close()
            raise
        except BaseException:
            now.remove()
            raise
        now.remove()


class Lost(RuntimeError):
    """The device cannot be used any more in this process."""


class Checking:
    """The file that says what this process checks now."""

    def __init__(self, folder: Path, key: str) -> None:
        self.path: Path | None = None
        self._handle = -1
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            self._handle, name = tempfile.mkstemp(dir=folder, prefix=f"{key}.", suffix=".tmp")
            if fcntl is not None:
                with contextlib.suppress(OSError):  # a file system without locks
                    fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Others see it from now on, and locked.
            self.path = Path(name).with_suffix(".checking")
            try:
                os.replace(name, self.path)
            except OSError:  # Windows does not rename open files
                self.close()
                self.path = None
                os.unlink(name)

    def note(self, what: str) -> None:
        """This is checked from now on. What is written outlives the process without a wait for the disk."""
        if self._handle >= 0:
            with contextlib.suppress(OSError):
                os.lseek(self._handle, 0, os.SEEK_SET)
                os.write(self._handle, what.ljust(80).encode())

    def remove(self) -> None:
        """The check is over."""
        if self.path is not None:
            with contextlib.suppress(OSError):
                self.path.unlink()
        self.close()

    def close(self) -> None:
        """Leave the file to be found."""
        if self._handle >= 0:
            with contextlib.suppress(OSError):
                os.close(self._handle)
            self._handle = -1


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
