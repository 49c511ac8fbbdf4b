"""Checkpointing: which states of a solve are kept, and in which order the reverse pass recomputes the other states.

Offline, if the number of steps is known: binomial checkpointing, which recomputes the fewest steps (Griewank and
Walther 2000, Algorithm 799, doi 10.1145/347837.347846). Online, in adaptive solves: the distance between kept states
doubles whenever all slots are full. The reverse pass then reverses one segment between two kept states after another.
If the states of a segment do not fit in the free slots, it uses binomial checkpointing in that segment.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Generic, TypeVar

import torch

from node_cuda.gradients.discrete.memory import SHARE, free_memory

State = TypeVar("State")

MOST_PLACES = 64
"""The number of places among which `worth_keeping` chooses. Its work grows with the cube of this number."""


def reach(slots: int, repeats: int) -> int:
    """Return beta, the number of steps that can be reversed if each is recomputed at most `repeats` times.

    slots: the number of states, including the first one.
    """
    return math.comb(slots + repeats, slots) if slots >= 0 and repeats >= 0 else 0


def first_advance(steps: int, slots: int) -> int:
    """Return the steps m to advance before the next state is kept, for the fewest recomputed steps: 1 <= m < steps."""
    repeats = 1
    while reach(slots, repeats) < steps:
        repeats += 1
    return min(reach(slots, repeats - 1), steps - reach(slots - 1, repeats - 1))


def repeats(steps: int, slots: int) -> int:
    """Return the fewest steps to recompute for the reversal of `steps` steps from a kept state: r N - C(c + r, r - 1).

    slots: the number of states, including the kept one. The replay of each step in its own reversal is not counted.
    """
    if steps <= 1:
        return 0
    r = 1
    while reach(slots, r) < steps:
        r += 1
    return r * steps - math.comb(slots + r, r - 1)


def binomial_places(steps: int, slots: int) -> list[int]:
    """Return the numbers of the steps that begin with a kept state, for a forward solve with this many steps."""
    places, place = [0], 0
    while len(places) < slots and steps - place > 1:
        place += first_advance(steps - place, slots - len(places) + 1)
        places.append(place)
    return places


def slots_for(bytes_a_state: int, device: torch.device) -> int:
    """Return the number of states that fit in their share of the free memory of the device, at least 8."""
    return max(int(SHARE * free_memory(device)) // max(bytes_a_state, 1), 8)


class Checkpoints(Generic[State]):
    """The kept states, by the number of the step that begins with them. At most `slots` at a time; None: all states.

    steps: the number of steps that there will be, if it is known. peak: the largest number of states held at a time.
    The state that the last step began with is also kept until that step is reversed, because the solver has it anyway.
    """

    def __init__(self, slots: int | None, steps: int | None = None) -> None:
        self.slots = slots
        self.peak = 0
        self._kept: dict[int, State] = {}
        self._last: tuple[int, State] | None = None
        self._stride = 1
        self._places = frozenset(binomial_places(steps, slots)) if slots and steps else None

    @property
    def spent(self) -> bool:
        """Whether no state is left, because the steps were reversed."""
        return self._last is None

    def offer(self, i: int, state: State) -> None:
        """Take the state with which the forward solve begins step i. The calls are in the order of the steps."""
        self._last = (i, state)
        if self._places is not None:
            if i in self._places:
                self._keep(i, state)
            return
        if i % self._stride:
            return
        if len(self._kept) == self.slots:
            self._stride *= 2
            self._kept = {j: kept for j, kept in self._kept.items() if j % self._stride == 0}
            if i % self._stride:
                return
        self._keep(i, state)

    def replace_first(self, state: State) -> None:
        """Replace the state that the first step began with, if it is still kept."""
        if 0 in self._kept:
            self._kept[0] = state
        if self._last is not None and self._last[0] == 0:
            self._last = (0, state)

    def reverse(self, advance: Callable[[int, State], State], back: Callable[[int, State], None]) -> None:
        """Call back(i, state) for every step i, the last one first. advance(i, state) gives the state after step i."""
        if self._last is None:
            return
        stop, state = self._last
        self._last = None
        if self._places is None and self.slots is not None:
            self._kept = {i: self._kept[i] for i in worth_keeping(list(self._kept), stop, self.slots)}
        back(stop, state)
        del state
        while self._kept:
            start = max(self._kept)
            if start < stop:
                self._segment(start, stop, advance, back)
            del self._kept[start]
            stop = min(start, stop)

    def _segment(
        self, start: int, stop: int, advance: Callable[[int, State], State], back: Callable[[int, State], None]
    ) -> None:
        """Reverse the steps between the kept state `start` and `stop`, with the free slots."""
        while stop - start > 1:
            state = self._kept[start]
            free = stop - start if self.slots is None else self.slots - len(self._kept)
            middle = stop - 1 if free == 0 else start + first_advance(stop - start, free + 1)
            for i in range(start, middle):
                state = advance(i, state)
            if free == 0:
                back(middle, state)
            else:
                self._keep(middle, state)
                del state
                self._segment(middle, stop, advance, back)
                del self._kept[middle]
            stop = middle
        back(start, self._kept[start])

    def _keep(self, i: int, state: State) -> None:
        self._kept[i] = state
        self.peak = max(self.peak, len(self._kept))


def worth_keeping(places: list[int], stop: int, slots: int) -> list[int]:
    """Return the kept places with which the reversal of all steps before `stop` recomputes the fewest steps.

    A place that is dropped frees a slot for the later segments. The result is all places, or a choice among at most
    MOST_PLACES of them by dynamic programming.
    """
    given, places = places, places[:: math.ceil(len(places) / MOST_PLACES)]
    count = len(places)
    # best[rank][a]: (steps to recompute from places[a] on, the next place), if places[a] is the rank-th kept place.
    best: list[list[tuple[int, int | None]]] = [[(0, None)] * count for _ in range(count + 2)]
    for a in range(count - 1, -1, -1):
        for rank in range(a + 1, 0, -1):
            slots_left = slots - rank + 1
            options: list[tuple[int, int | None]] = [(repeats(stop - places[a], slots_left), None)]
            if slots_left > 1:
                options += [
                    (repeats(places[b] - places[a], slots_left) + best[rank + 1][b][0], b) for b in range(a + 1, count)
                ]
            best[rank][a] = min(options, key=lambda option: option[0])
    kept, a, rank = [], 0, 1
    while a is not None:
        kept.append(places[a])
        a, rank = best[rank][a][1], rank + 1
    segments = zip(given, [*given[1:], stop], strict=True)
    of_all = sum(repeats(end - start, slots - i) for i, (start, end) in enumerate(segments))
    return given if of_all <= best[1][0][0] else kept
