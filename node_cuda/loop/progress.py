"""`options=dict(progress=True)`: a bar that shows where a long solve stands, by tqdm, also in notebooks."""

from __future__ import annotations

import time
from collections.abc import Sequence

from node_cuda._extras import extra

OFTEN = 0.1
"""Seconds between two texts of a bar."""


class Progress:
    """The bar of one pass. times: the first and the last solver time are the ends of the bar.

    direction: the user's time is direction * solver time. endless: the end is not known, because an event is looked
    for; then the bar has no share, and shows the time alone. backwards: the bar is that of a backward pass. With
    descending times it is filled from the last time to the first.
    """

    def __init__(self, times: Sequence[float], direction: float, *, endless: bool = False, backwards: bool = False):
        self.start, self.end = times[0], times[-1]
        self.direction = direction
        self.endless = endless
        tqdm = extra("tqdm.auto", 'options["progress"] = True', "progress").tqdm
        unknown, known = "{desc}: [{elapsed}{postfix}]", "{desc}: {percentage:3.0f}%|{bar}| [{elapsed}{postfix}]"
        self._bar = tqdm(
            total=None if endless else 1.0,
            desc="backwards" if backwards else "forwards",
            bar_format=unknown if endless else known,
            mininterval=OFTEN,
        )
        self._written = time.monotonic()
        self._latest: tuple[float, float, int, int] | None = None

    def show(self, t: float, h: float, nfe: int, rejected: int) -> None:
        """Show that the solve has come to t in solver time, after a step of h. It writes at most ten times a second."""
        self._latest = t, h, nfe, rejected
        if time.monotonic() - self._written >= OFTEN:
            self._write()

    def close(self) -> None:
        """Write the last state, and end the line."""
        self._write()
        self._bar.close()

    def _write(self) -> None:
        self._written = time.monotonic()
        if self._latest is None:
            return
        t, h, nfe, rejected = self._latest
        if not self.endless:  # the last step may pass the end
            t = min(t, self.end)
        share = 1.0 if self.end == self.start else (t - self.start) / (self.end - self.start)
        self._bar.n = 0 if self.endless else share
        self._bar.set_postfix_str(f"t = {self.direction * t:.4g}, h = {h:.2g}, nfe = {nfe}, rejected = {rejected}")
