"""The regularisers of Finlay et al. 2020 (How to train your neural ODE, arXiv:2002.02798), as an integral beside y:

    int kinetic |f(t, y)|^2 + jacobian |eps^T df/dy|^2 |dt|,  E over eps of the latter: the squared Frobenius norm.

They keep a trained flow straight and its field smooth, so that it takes few steps. See docs/integral.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from node_cuda._typing import Func, State
from node_cuda.gradients.parameters import is_wrapped
from node_cuda.integrals.integral import AugmentedField, as_tuple
from node_cuda.problem.problem import Problem
from node_cuda.status import InvalidInput, InvalidType, Unsupported

NOISES = ("gaussian", "rademacher")


class Regularized(nn.Module):
    """func, and what `solve` is to integrate beside it; made by `regularized`."""

    def __init__(self, func: Func, kinetic: float, jacobian: float, parts: Any, noise: Any) -> None:
        super().__init__()
        self.func = func
        self.kinetic = kinetic
        self.jacobian = jacobian
        self.parts = parts
        self.noise = noise

    def forward(self, t: Tensor, y: Any) -> Any:
        """func(t, y), as it is."""
        return self.func(t, y)

    def extra_repr(self) -> str:
        """The weights."""
        return f"kinetic={self.kinetic:g}, jacobian={self.jacobian:g}"

    def beside(self, problem: Problem) -> Penalty:
        """The penalty of one solve, with noise of its own. Raises InvalidInput."""
        shapes = problem.layout.shapes or (problem.y0.shape,)
        parts = self._chosen(len(shapes))
        noise = self._drawn([shapes[i] for i in parts], problem.y0) if self.jacobian else []
        return Penalty(self, problem, parts, noise)

    def _chosen(self, count: int) -> tuple[int, ...]:
        if self.parts is None:
            return tuple(range(count))
        chosen = as_tuple(self.parts)
        if not chosen or not all(type(i) is int and -count <= i < count for i in chosen):
            raise InvalidInput(
                f"parts must be the places of components of y0, which has {count}; got {self.parts!r}. Use `parts=0` "
                "for z of (z, logp), or None for all."
            )
        return tuple(dict.fromkeys(i % count for i in chosen))

    def _drawn(self, shapes: list[torch.Size], y0: Tensor) -> list[Tensor]:
        if isinstance(self.noise, str):
            drawn = [_noise(self.noise, shape, y0.dtype, y0.device) for shape in shapes]
            if any(map(is_wrapped, drawn)):
                raise Unsupported(
                    "regularized cannot draw noise for each sample of torch.func.vmap. Give it as `noise=`, use "
                    'randomness="same", or solve for all samples as one state.'
                )
            return drawn
        noise = as_tuple(self.noise)
        if [x.shape for x in noise] != shapes:
            raise InvalidInput(
                f"noise must have the shapes of the components of y0 that count, {[tuple(x) for x in shapes]}; got "
                f'{[tuple(x.shape) for x in noise]}. Use `torch.randn_like(y0)`, or noise="gaussian".'
            )
        return [x.detach().to(y0) for x in noise]


def regularized(
    func: Func,
    kinetic: float = 0.0,
    jacobian: float = 0.0,
    *,
    parts: int | Sequence[int] | None = None,
    noise: str | Tensor | Sequence[Tensor] = "gaussian",
) -> Regularized:
    """func with a penalty: `solve(regularized(func, kinetic=0.01, jacobian=0.01), y0, t)` gives the y of func alone,
    by the same steps, and in `.integral` the integral over time from t[0] on of

        kinetic |f(t, y)|^2 + jacobian |eps^T df/dy|^2,

    not negative in either direction of time. So does `NeuralODE`, which returns (y, integral). Differentiable in every
    gradient mode; func must be differentiable twice then, and once in any case if jacobian > 0. func is evaluated once
    a stage.

    func: of (t, y), an nn.Module or not. kinetic, jacobian: the weights; a part with weight 0 is not computed. parts:
    of a tuple state, the component or components that count, as 0 for z of (z, logp); by default all. The others are
    held fixed in df/dy. noise: the law of eps, "gaussian" or "rademacher" (of which torch.manual_seed gives the same
    again), or eps itself, of the shape of y0 or a tuple for those parts; drawn once a solve.

    The penalty is one number a sample, of shape (y0.shape[0],), if the components that count agree on their first
    dimension and one of them has a second; else 0-d. Samples must not see each other for that: else the derivative of
    all of them counts where it is by a sample. In y0's real dtype.

    Takes no part in the step control, nor in that of the backward pass (method="scipy_solver" has a norm of its own,
    in which s counts as an element without error). Raises InvalidType or InvalidInput.
    Source: Finlay, Jacobsen, Nurbekyan and Oberman 2020, arXiv:2002.02798.
    """
    if isinstance(func, Regularized) or not callable(func):
        got = "regularized already" if isinstance(func, Regularized) else f"a {type(func).__name__}"
        raise InvalidType(f"func must be callable as func(t, y), without a penalty; got one that is {got}.")
    for name, weight in (("kinetic", kinetic), ("jacobian", jacobian)):
        if not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
            raise InvalidInput(f"{name} must be a number that is not negative; got {weight!r:.60}. Use 0.01, say.")
    if not (kinetic or jacobian):
        raise InvalidInput("regularized needs a weight; got kinetic=0 and jacobian=0. Use kinetic=0.01, or func.")
    if isinstance(noise, str) and noise not in NOISES:
        raise InvalidInput(f"noise must be {' or '.join(map(repr, NOISES))}, or tensors; got {noise!r}.")
    if not isinstance(noise, str) and not all(isinstance(x, Tensor) for x in as_tuple(noise)):
        raise InvalidType(f"noise must be a tensor, or a tuple of them; got {noise!r:.60}. Use `torch.randn_like(y0)`.")
    return Regularized(func, kinetic, jacobian, parts, noise)


def refuse_regularized(func: Func, name: str) -> None:
    """Raise InvalidInput: the function of this name returns y alone."""
    if isinstance(func, Regularized):
        raise InvalidInput(
            f"{name} returns y alone, and the penalty of regularized(...) would be lost. Use `solve(...)`, which has "
            "it in `.integral`, or NeuralODE."
        )


def _noise(law: str, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Independent numbers of mean 0 and variance 1, which nobody differentiates by."""
    if law == "gaussian":
        noise = torch.randn(shape, dtype=dtype, device=device)
    else:
        noise = (2 * torch.randint(2, shape, device=device) - 1).to(dtype)
    functorch = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    while functorch.is_gradtrackingtensor(noise):  # torch.func.grad wraps whatever is made inside
        noise = functorch.get_unwrapped(noise)
    return noise


class Penalty(AugmentedField):
    """The penalty of one solve. noise: one tensor for each of the parts; none if the Jacobian does not count."""

    measured = False

    def __init__(self, of: Regularized, problem: Problem, parts: tuple[int, ...], noise: list[Tensor]) -> None:
        every = problem.layout.shapes or (problem.y0.shape,)
        super().__init__(of.func, problem, _batch([every[i] for i in parts]), real=True)
        # The integral is over |dt|.
        self.kinetic, self.jacobian = (problem.direction * weight for weight in (of.kinetic, of.jacobian))
        self.parts = parts
        self.noise = noise

    def evaluate(self, t: Tensor, y: State) -> tuple[State, Tensor]:
        if not self.noise:
            dy = self.asked(t, y)
            return dy, self.kinetic * self._squared([as_tuple(dy)[i] for i in self.parts])
        taped = torch.is_grad_enabled()
        # In inference mode nothing is recorded, nor later of tensors that were made there.
        with torch.inference_mode(False), torch.enable_grad():
            t, *plain = (x.clone() if x.is_inference() else x for x in (t, *as_tuple(y)))
            roots = [_root(plain[i], taped) for i in self.parts]
            for i, root in zip(self.parts, roots, strict=True):
                plain[i] = root.clone()  # which func may write into
            dy = as_tuple(self.asked(t, plain[0] if isinstance(y, Tensor) else tuple(plain)))
            taped = taped and (not all(x.is_leaf for x in roots) or _reaches_others(dy, roots))
            chosen = [dy[i].to(root.dtype) for i, root in zip(self.parts, roots, strict=True)]
            rate = self.jacobian * self._squared(_vjp(chosen, roots, self.noise, taped))
            if self.kinetic:
                rate = rate + self.kinetic * self._squared(chosen)
        if not taped:
            dy, rate = tuple(x.detach() for x in dy), rate.detach()
        return (dy[0] if isinstance(y, Tensor) else dy), rate

    def _squared(self, parts: Sequence[Tensor]) -> Tensor:
        """The sum of squares over all elements of the parts, for each sample."""
        wide = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in parts]
        squares = [(x * x.conj()).real for x in wide]
        if not self.shape:
            return torch.stack([x.sum() for x in squares]).sum()
        return torch.stack([x.reshape(len(x), math.prod(x.shape[1:])).sum(1) for x in squares]).sum(0)


def _batch(shapes: list[torch.Size]) -> torch.Size:
    """(samples,) if all have that first dimension and one has a second, else ()."""
    together = all(shape and shape[0] == shapes[0][0] for shape in shapes)
    return shapes[0][:1] if together and any(len(shape) > 1 for shape in shapes) else torch.Size()


def _root(y: Tensor, taped: bool) -> Tensor:
    """y as a tensor to differentiate by: itself where it is on the tape."""
    return y if taped and y.requires_grad else y.detach().requires_grad_(True)


def _vjp(outputs: list[Tensor], roots: list[Tensor], noise: list[Tensor], taped: bool) -> list[Tensor]:
    """eps^T df/dy, by each root."""
    dependent = [(x, eps) for x, eps in zip(outputs, noise, strict=True) if x.requires_grad]
    if not dependent:
        return [torch.zeros_like(root) for root in roots]
    found = torch.autograd.grad(
        [x for x, _ in dependent], roots, [eps for _, eps in dependent], create_graph=taped, allow_unused=True
    )
    return [torch.zeros_like(root) if g is None else g for g, root in zip(found, roots, strict=True)]


def _reaches_others(outputs: Sequence[Tensor], roots: list[Tensor]) -> bool:
    """Do the outputs depend on a tensor that wants a gradient, besides the roots?"""
    waiting = [x.grad_fn for x in outputs if x.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        leaf = getattr(node, "variable", None)
        if leaf is not None and not any(leaf is root for root in roots):
            return True
        below = {x for x, _ in node.next_functions if x is not None} - seen
        seen |= below
        waiting.extend(below)
    return False
