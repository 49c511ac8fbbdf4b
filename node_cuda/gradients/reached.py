"""Check that the tensors that func used in the forward pass get a gradient in the backward pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from node_cuda.status import InvalidField


class UsedParameters:
    """The indices of the parameters that func used and that have no gradient from a vjp yet."""

    def __init__(self, used: Iterable[int]) -> None:
        self._missing = set(used)
        self._vjps = 0

    def see(self, vjp: Sequence[Tensor | None]) -> None:
        """Note the gradients of one vjp. They are None for tensors that were not used."""
        self._vjps += 1
        if self._missing:
            for i in tuple(self._missing):
                if vjp[i] is not None:
                    self._missing.discard(i)

    def reach_as(self, other: UsedParameters) -> None:
        """Note the vjps that `other` has seen, because a captured solve repeats them."""
        self._vjps += other._vjps
        self._missing &= other._missing

    def check(self, params: Sequence[Tensor]) -> None:
        """Raise InvalidField if a gradient is missing at the end of the backward pass."""
        if self._vjps and self._missing:
            shapes = ", ".join(str(tuple(params[i].shape)) for i in sorted(self._missing))
            raise InvalidField(
                f"func used a tensor in the forward pass (shape {shapes}) that it does not use in the backward pass, "
                "where its gradient is to be computed: an attribute was replaced in between, or func chooses its "
                "tensors by t, and the steps of the two passes are at other times. Call backward() first, make the "
                'tensor a parameter of an nn.Module, or use gradient="discrete", whose passes have the same steps.'
            )
