"""The regularisers of Finlay et al. 2020 (How to train your neural ODE, arXiv:2002.02798), as an integral along y:

    int kinetic |f(t, y)|^2 + jacobian |eps^T df/dy|^2 |dt|

The mean over eps of the second term is the squared Frobenius norm of the Jacobian. The regularisers keep a trained flow
straight and its field smooth, so that it takes few steps. See docs/integral.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from node_cuda._torch_modes import recordable
from node_cuda._typing import Func, State
from node_cuda.gradients.parameters import is_wrapped
from node_cuda.integrals.integral import AugmentedField, as_tuple
from node_cuda.problem.problem import Problem
from node_cuda.status import InvalidInput, InvalidType, Unsupported

NOISES = ("gaussian", "rademacher")


class Regularized(nn.Module):
    """func with a penalty that `solve` integrates along the solution; made by `regularized`."""

    def __init__(self, func: Func, kinetic: float, jacobian: float, parts: Any, noise: Any) -> None:
        super().__init__()
        self.func = func
        self.kinetic = kinetic
        self.jacobian = jacobian
        self.parts = parts
        self.noise = noise

    def forward(self, t: Tensor, y: Any) -> Any:
        """Return func(t, y), unchanged."""
        return self.func(t, y)

    def extra_repr(self) -> str:
        """Return the weights as text."""
        return f"kinetic={self.kinetic:g}, jacobian={self.jacobian:g}"

    def beside(self, problem: Problem) -> Penalty:
        """Return the penalty of one solve, with new noise. Raises InvalidInput."""
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
                f"parts must be indices of components of y0, which has {count}; got {self.parts!r}. Use `parts=0` "
                "for z of (z, logp), or None for all."
            )
        return tuple(dict.fromkeys(i % count for i in chosen))

    def _drawn(self, shapes: list[torch.Size], y0: Tensor) -> list[Tensor]:
        if isinstance(self.noise, str):
            drawn = [draw_noise(self.noise, shape, y0.dtype, y0.device) for shape in shapes]
            if any(map(is_wrapped, drawn)):
                raise Unsupported(
                    "regularized cannot draw noise for each sample of torch.func.vmap. Give it as `noise=`, use "
                    'randomness="same", or solve for all samples as one state.'
                )
            return drawn
        noise = as_tuple(self.noise)
        if [x.shape for x in noise] != shapes:
            raise InvalidInput(
                f"noise must have the shapes of the chosen components of y0, {[tuple(x) for x in shapes]}; got "
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
    """Return func with a penalty for `solve` and `NeuralODE`.

    `solve(regularized(func, kinetic=0.01, jacobian=0.01), y0, t)` gives the same y as func alone, by the same steps. In
    `.integral` it also gives the integral over time from t[0] of

        kinetic |f(t, y)|^2 + jacobian |eps^T df/dy|^2,

    which is never negative, in both directions of time. `NeuralODE` then returns (y, integral). The penalty is
    differentiable in every gradient mode, for which func must be differentiable twice. If jacobian > 0, func must in
    any case be differentiable once. func is evaluated once for each stage.

    func: a function of (t, y), also an nn.Module. kinetic, jacobian: the weights; a part with weight 0 is not computed.
    parts: for a tuple state, the index or indices of the components that count, e.g. 0 for z of (z, logp); by default
    all. The others are constant in df/dy. noise: the distribution of eps, "gaussian" or "rademacher" (repeatable with
    torch.manual_seed); or eps itself, with the shape of y0, or a tuple for those parts. It is drawn once for each
    solve.

    The penalty is one number for each sample, of shape (y0.shape[0],), if the components that count have the same first
    dimension and at least one of them has a second one. Else it is 0-d. The field must then treat samples
    independently: otherwise each sample's number contains the derivatives of all samples. The penalty has y0's real
    dtype.

    The penalty takes no part in the step control, also not in the backward pass. (method="scipy_solver" uses scipy's
    own norm, in which s counts as an element without error.) Raises InvalidType or InvalidInput. Source: Finlay,
    Jacobsen, Nurbekyan and Oberman 2020, arXiv:2002.02798.
    """
    if isinstance(func, Regularized) or not callable(func):
        got = "regularized already" if isinstance(func, Regularized) else f"a {type(func).__name__}"
        raise InvalidType(f"func must be callable as func(t, y), without a penalty; got one that is {got}.")
    for name, weight in (("kinetic", kinetic), ("jacobian", jacobian)):
        if not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
            raise InvalidInput(f"{name} must be a number, not negative; got {weight!r:.60}. Use for example 0.01.")
    if not (kinetic or jacobian):
        raise InvalidInput("regularized needs a weight; got kinetic=0 and jacobian=0. Use kinetic=0.01, or func.")
    if isinstance(noise, str) and noise not in NOISES:
        raise InvalidInput(f"noise must be {' or '.join(map(repr, NOISES))}, or tensors; got {noise!r}.")
    if not isinstance(noise, str) and not all(isinstance(x, Tensor) for x in as_tuple(noise)):
        raise InvalidType(f"noise must be a tensor, or a tuple of them; got {noise!r:.60}. Use `torch.randn_like(y0)`.")
    return Regularized(func, kinetic, jacobian, parts, noise)


def refuse_regularized(func: Func, name: str) -> None:
    """Raise InvalidInput if func is regularized: the function `name` returns y alone."""
    if isinstance(func, Regularized):
        raise InvalidInput(
            f"{name} returns y alone, and the penalty of regularized(...) would be lost. Use `solve(...)`, which has "
            "it in `.integral`, or NeuralODE."
        )


def draw_noise(law: str, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return independent numbers of mean 0 and variance 1, which take no part in any derivative."""
    if law == "gaussian":
        noise = torch.randn(shape, dtype=dtype, device=device)
    else:
        noise = (2 * torch.randint(2, shape, device=device) - 1).to(dtype)
    functorch = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    while functorch.is_gradtrackingtensor(noise):  # torch.func.grad wraps every tensor made inside it
        noise = functorch.get_unwrapped(noise)
    return noise


class Penalty(AugmentedField):
    """The penalty of one solve. noise: one tensor for each of the parts; empty if the weight of the Jacobian is 0."""

    measured = False

    def __init__(self, of: Regularized, problem: Problem, parts: tuple[int, ...], noise: list[Tensor]) -> None:
        every = problem.layout.shapes or (problem.y0.shape,)
        super().__init__(of.func, problem, _batch([every[i] for i in parts]), real=True)
        # The integral is over |dt|, so the weights take the sign of the direction.
        self.kinetic, self.jacobian = (problem.direction * weight for weight in (of.kinetic, of.jacobian))
        self.parts = parts
        self.noise = noise

    def evaluate(self, t: Tensor, y: State) -> tuple[State, Tensor]:
        if not self.noise:
            dy = self.asked(t, y)
            return dy, self.kinetic * self._squared([as_tuple(dy)[i] for i in self.parts])
        taped = torch.is_grad_enabled()
        # Inference mode records nothing, and tensors made in it cannot be recorded later.
        with torch.inference_mode(False), torch.enable_grad():
            t, *plain = recordable(t, *as_tuple(y))
            roots = [_root(plain[i], taped) for i in self.parts]
            for i, root in zip(self.parts, roots, strict=True):
                plain[i] = root.clone()  # func may write into the copy
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
        """Return the sum of squares over all elements of the parts, for each sample."""
        wide = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in parts]
        squares = [(x * x.conj()).real for x in wide]
        if not self.shape:
            return torch.stack([x.sum() for x in squares]).sum()
        return torch.stack([x.reshape(len(x), math.prod(x.shape[1:])).sum(1) for x in squares]).sum(0)


def _batch(shapes: list[torch.Size]) -> torch.Size:
    """Return (samples,) if all shapes have the same first dimension and one has a second one, else ()."""
    together = all(shape and shape[0] == shapes[0][0] for shape in shapes)
    return shapes[0][:1] if together and any(len(shape) > 1 for shape in shapes) else torch.Size()


def _root(y: Tensor, taped: bool) -> Tensor:
    """Return y as a tensor to differentiate by: y itself if autograd records it."""
    return y if taped and y.requires_grad else y.detach().requires_grad_(True)


def _vjp(outputs: list[Tensor], roots: list[Tensor], noise: list[Tensor], taped: bool) -> list[Tensor]:
    """Return eps^T df/dy for each root."""
    dependent = [(x, eps) for x, eps in zip(outputs, noise, strict=True) if x.requires_grad]
    if not dependent:
        return [torch.zeros_like(root) for root in roots]
    found = torch.autograd.grad(
        [x for x, _ in dependent], roots, [eps for _, eps in dependent], create_graph=taped, allow_unused=True
    )
    return [torch.zeros_like(root) if g is None else g for g, root in zip(found, roots, strict=True)]


def _reaches_others(outputs: Sequence[Tensor], roots: list[Tensor]) -> bool:
    """Return whether the outputs depend on a tensor that requires a gradient, other than the roots."""
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
