"""Do the tensors that func used in the forward pass get a gradient in the backward pass?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from node_cuda.status import InvalidField


class UsedParameters:
    """The parameters, by their places, that func was seen to use, and of which no vjp has given a gradient yet."""

    def __init__(self, used: Iterable[int]) -> None:
        self._missing = set(used)
        self._vjps = 0

    def see(self, vjp: Sequence[Tensor | None]) -> None:
        """The gradients that one vjp gave; None for a tensor that was not used."""
        self._vjps += 1
        if self._missing:
            self._missing = {i for i in self._missing if vjp[i] is None}

    def reach_as(self, other: UsedParameters) -> None:
        """What the vjps gave that `other` saw, which a captured solve does again."""
        self._vjps += other._vjps
        self._missing &= other._missing

    def check(self, params: Sequence[Tensor]) -> None:
        """Raise if a gradient is missing at the end of the backward pass."""
        if self._vjps and self._missing:
            shapes = ", ".join(str(tuple(params[i].shape)) for i in sorted(self._missing))
            raise InvalidField(
                f"func used a tensor in the forward pass (shape {shapes}) that it does not use in the backward pass, "
                "where its gradient is to be computed: an attribute was replaced in between. Call backward() before, "
                "or make the tensor a parameter of an nn.Module."
            )
