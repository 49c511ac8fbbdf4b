"""Computes the Jacobian of the field, one matrix for each sample, by autograd or by the user's function.

Autograd computes vector-Jacobian products, all rows in one batched call. Forward mode was slower on the CPU in every
case that was measured (docs/stiff.md). If a field does not go through torch's vmap, the rows are computed one by one,
and a warning says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from node_cuda._torch_modes import transformed
from node_cuda.methods.implicit.blocks import Blocks
from node_cuda.problem.problem import Problem
from node_cuda.solution import Stats
from node_cuda.status import InvalidField, InvalidInput, SolveError, Status, UnsupportedTransform, users_level

_TWICE = (
    '{} differentiates func {}, and torch says: {} Pass options=dict(jac=...), take method="kvaerno5", which needs '
    'first derivatives only, or an explicit method, "dopri5".'
)
WRONG = 1e-3
"""A relative difference above this means that the user's Jacobian is not the derivative of func. Finite differences err
by less."""


class Linearised(NamedTuple):
    """The field at a point: the state f, the jacobian of shape (count, size, size), and df/dt of shape (count, size).

    df_dt is None if it is 0.
    """

    f: Tensor
    jacobian: Tensor
    df_dt: Tensor | None


class Jacobian:
    """Linearises the problem's field. jac: the user's function of (t, y), or None. timed: compute df/dt as well."""

    def __init__(
        self, problem: Problem, blocks: Blocks, jac: Callable[..., Tensor] | None, stats: Stats, *, timed: bool
    ) -> None:
        self.field = problem.field
        self.direction = problem.direction
        self.layout = problem.layout
        self.blocks = blocks
        self.jac = jac
        self.stats = stats
        self.timed = timed
        self._by_rows = False
        self._units: Tensor | None = None
        self._looked = False
        self._has_parameters: bool | None = None
        self._differentiable_twice = False

    def at(self, t: Tensor, y: Tensor, *, twice: bool = False) -> Linearised:
        """Return the field and its derivatives at (t, y).

        While autograd records, it also records f. With `twice` it also records the derivatives, which needs second
        derivatives of the field.
        """
        refuse_transforms()
        self.stats.jacobians += 1
        recording, on_tape = torch.is_grad_enabled(), y.requires_grad or t.requires_grad
        with _recording():
            y, t = _leaf(y, recording), _leaf(t, recording) if self.timed else t
            if self.timed and recording and y.grad_fn is not None:
                y, t = _joined(y, t)
            u = self.blocks.split(y)
            f = self.field(t, self.blocks.join(u))
            rows = self.blocks.split(f)
            if recording and self._has_parameters is None:
                self._has_parameters = _has_leaves(f, {y, t})
            on_tape = recording and (on_tape or bool(self._has_parameters))
            taped = on_tape and twice
            if self.jac is not None:
                jacobian = self._users(t, y)
                if not self._looked:
                    self._looked = True
                    self._check_users(rows, u, jacobian)
                df_dt = self._of_time(rows, t, taped) if self.timed else None
            else:
                jacobian, df_dt = self._by_autograd(rows, u, t, y, taped)
        if taped:
            return Linearised(f, jacobian, df_dt)
        df_dt = None if df_dt is None else df_dt.detach()
        return Linearised(f if on_tape else f.detach(), jacobian.detach(), df_dt)

    def check(self, jacobian: Tensor, s: float) -> None:
        """Raise SolveError if the Jacobian of a failed step, at the solver time s, is not finite."""
        self.stats.host_reads += 1
        if bool(torch.isfinite(jacobian).all()):
            return
        self.stats.nfe = self.field.nfe
        source = "autograd's" if self.jac is None else "options['jac']'s"
        raise SolveError(
            Status.NON_FINITE,
            self.direction * s,
            self.stats,
            f"The Jacobian df/dy, {source}, holds NaN or infinity, as that of sqrt or of a norm does at 0. Pass "
            "options=dict(jac=...) with the right one.",
        )

    # ------------------------------------------------------------------ by autograd
    def _by_autograd(self, rows: Tensor, u: Tensor, t: Tensor, y: Tensor, taped: bool) -> tuple[Tensor, Tensor | None]:
        size, count = self.blocks.size, self.blocks.count
        if not rows.requires_grad:
            self._check_constant(t, y, rows)
            return rows.new_zeros(count, size, size), None
        if self._units is None:
            unit = torch.eye(size, dtype=rows.dtype, device=rows.device)
            self._units = unit[:, None, :].expand(size, count, size)
        if taped and not self._differentiable_twice:
            self._differentiable_twice = True
            self._check_twice(rows, u)
        # Of a single sample the same products give df/dt.
        together = self.timed and count == 1
        gradient, *of_time = self._rows(rows, (u, t) if together else (u,), self._units, taped)
        if gradient is None:
            self._check_constant(t, y, rows)
        jacobian = rows.new_zeros(count, size, size) if gradient is None else gradient.transpose(0, 1)
        if not self._looked:
            self._looked = True
            if count > 1:
                self._check_blocks(rows, u, jacobian)
        if together:
            return jacobian, None if of_time[0] is None else of_time[0].reshape(1, size)
        return jacobian, self._of_time(rows, t, taped) if self.timed else None

    def _rows(self, rows: Tensor, by: tuple[Tensor, ...], units: Tensor, taped: bool) -> tuple[Tensor | None, ...]:
        """Return the vjps of all units, each of shape (size, *by.shape); None if the field does not depend on it."""
        if not self._by_rows:
            try:
                return torch.autograd.grad(
                    rows, by, units, retain_graph=True, create_graph=taped, allow_unused=True, is_grads_batched=True
                )
            except (RuntimeError, NotImplementedError) as failure:
                single = self._one_by_one(rows, by, units, taped)
                self._by_rows = True
                warnings.warn(
                    f"func does not go through torch's vmap, so that its Jacobian takes {self.blocks.size} backward "
                    f"passes one after another, and not one of them batched: {str(failure).splitlines()[0]:.200} Pass "
                    "options=dict(jac=...), a function of (t, y) that returns df/dy, if that is slow.",
                    stacklevel=users_level(),
                )
                return single
        return self._one_by_one(rows, by, units, taped)

    def _one_by_one(
        self, rows: Tensor, by: tuple[Tensor, ...], units: Tensor, taped: bool
    ) -> tuple[Tensor | None, ...]:
        what = "The Jacobian of an implicit method"
        found: list[Tensor | None] = []
        for x in by:
            each = [_grad(rows, x, unit, create_graph=taped, what=what) for unit in units]
            none = all(row is None for row in each)
            found.append(None if none else torch.stack([torch.zeros_like(x) if r is None else r for r in each]))
        return tuple(found)

    def _of_time(self, rows: Tensor, t: Tensor, taped: bool) -> Tensor | None:
        """Return df/dt, of shape (count, size), by differentiating the vjp of a dummy cotangent by that cotangent."""
        if not rows.requires_grad:
            return None
        dummy = torch.zeros_like(rows).requires_grad_(True)
        total = _grad(rows, t, dummy, create_graph=True, what="A Rosenbrock method, which needs df/dt,")
        if total is None or not total.requires_grad:
            return None
        return _grad(total, dummy, None, create_graph=taped, what="A Rosenbrock method, which needs df/dt,")

    # ------------------------------------------------------------------ checks
    def _check_constant(self, t: Tensor, y: Tensor, rows: Tensor) -> None:
        """Raise InvalidField if f has no graph but depends on y. Evaluates f once at another y."""
        if self._looked:
            return
        self._looked = True
        with torch.no_grad():
            other = self.blocks.split(self.field(t.detach(), y.detach() * 1.001 + 1e-3))
        self.stats.host_reads += 1
        if not torch.equal(other, rows.detach()):
            raise InvalidField(
                "func depends on y, but torch cannot differentiate it by y: it works under torch.no_grad(), detaches, "
                "or leaves torch. An implicit method needs df/dy: pass options=dict(jac=...), a function of (t, y) "
                'that returns it, or take an explicit method, "dopri5".'
            )

    def _check_twice(self, rows: Tensor, u: Tensor) -> None:
        """Raise InvalidField if func can be differentiated once only. Called once.

        The graph of the first derivative then contains an error node. Under vmap, and without a derivative by the
        cotangent, it would not.
        """
        what = "A Rosenbrock method, whose steps hold df/dy,"
        row = _grad(rows, u, torch.ones_like(rows).requires_grad_(True), create_graph=True, what=what)
        if row is not None and any(node.name().endswith("::Error") for node in _nodes(row)):
            raise InvalidField(_TWICE.format(what, "twice", "an operation in it can be differentiated once only."))

    def _check_blocks(self, rows: Tensor, u: Tensor, jacobian: Tensor) -> None:
        """Raise InvalidInput if samples depend on each other.

        One product of the whole Jacobian with a vector then differs from that of the blocks.
        """
        generator = torch.Generator().manual_seed(0)  # the user's random numbers stay as they are
        weights = (torch.rand(rows.shape, generator=generator, dtype=torch.float64) + 0.5).to(rows)
        (whole,) = torch.autograd.grad(rows, u, weights, retain_graph=True, allow_unused=True)
        if whole is None:
            return
        self.stats.host_reads += 1
        if bool((_off(whole, weights, jacobian) > 0.0).any()):
            raise InvalidInput(
                f'options["batch_dims"] says that the state is {self.blocks.count} samples that do not see each '
                "other, but the derivative of one by another is not zero (a norm over the batch, attention, a mean?). "
                "Drop batch_dims, or make the samples independent."
            )

    def _check_users(self, rows: Tensor, u: Tensor, jacobian: Tensor) -> None:
        """Warn if one product with the user's Jacobian differs from that of autograd, if autograd can compute it."""
        if not rows.requires_grad:
            return
        weights = torch.linspace(0.5, 1.5, rows.numel(), dtype=torch.float64).reshape(rows.shape).to(rows)
        try:
            (whole,) = torch.autograd.grad(rows, u, weights, retain_graph=True, allow_unused=True)
        except (RuntimeError, NotImplementedError):  # torch cannot differentiate func, which is why jac was given
            return
        if whole is None:
            return
        self.stats.host_reads += 1
        off = float(_off(whole, weights, jacobian, WRONG).max())
        if off > 0.0:
            warnings.warn(
                'options["jac"] is not df/dy of func: a product with it differs from that of autograd. The steps are '
                'then slower, and the gradients of "discrete" and "backprop" are wrong. It must return [.., i, j] = '
                "df_i/dy_j at (t, y); drop it if func is differentiable by torch.",
                stacklevel=users_level(),
            )

    # ------------------------------------------------------------------ the user's
    def _users(self, t: Tensor, y: Tensor) -> Tensor:
        assert self.jac is not None
        size, count = self.blocks.size, self.blocks.count
        found = self.jac(t, self.layout.unflatten(y))
        if not isinstance(found, Tensor) or found.numel() != count * size**2 or found.is_complex():
            got = f"{found.dtype} of shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"{found!r:.60}"
            need = f"({count}, {size}, {size})" if count > 1 else f"({size}, {size})"
            raise InvalidInput(
                f'options["jac"] must return df/dy of a flat state as a real tensor of {need}, [.., i, j] being '
                f"df_i/dy_j; got {got}."
            )
        return found.reshape(count, size, size).to(y.dtype.to_real())


def refuse_transforms() -> None:
    """Raise UnsupportedTransform inside a transform of torch.func, or in forward mode."""
    if transformed():
        raise UnsupportedTransform(
            "a transform of torch.func, or forward mode, over the steps of an implicit method, which differentiates "
            'func itself. Use `odeint_adjoint(..., gradient="discrete")`, which grad, vjp, jacrev and vmap go through.'
        )


def _recording() -> AbstractContextManager[Any]:
    """Return a context in which autograd records."""
    return _out_of_inference() if torch.is_inference_mode_enabled() else torch.enable_grad()


@contextmanager
def _out_of_inference() -> Iterator[None]:
    with torch.inference_mode(False), torch.enable_grad():
        yield


def _off(whole: Tensor, weights: Tensor, jacobian: Tensor, relative: float | None = None) -> Tensor:
    """Return how far w^T J by autograd and by the blocks differ, beyond rounding or this relative difference."""
    jacobian, eps = jacobian.detach(), torch.finfo(weights.dtype).eps
    blocks = torch.einsum("bi,bij->bj", weights, jacobian)
    size = torch.einsum("bi,bij->bj", weights.abs(), jacobian.abs())
    limit = (eps**0.5 if relative is None else relative) * size + 1e3 * eps * jacobian.abs().amax()
    return (whole.detach() - blocks).abs() - limit


def _joined(y: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return y and t as parts of one tensor. For the gradient by a leaf t, autograd would go through the whole tape."""
    both = torch.cat([y.reshape(-1), t.reshape(1).to(y.dtype)])
    last = both[-1]
    return both[:-1].reshape(y.shape), last.real if last.is_complex() else last


def _leaf(x: Tensor, taped: bool) -> Tensor:
    """Return a tensor to differentiate by: x itself if autograd records it, else a new leaf."""
    if taped and x.requires_grad:
        return x
    return (x.clone() if x.is_inference() else x.detach()).requires_grad_(True)


def _grad(of: Tensor, by: Tensor, weight: Tensor | None, *, create_graph: bool, what: str) -> Tensor | None:
    """Return one vjp. Raises InvalidField if func cannot be differentiated so often."""
    weight = torch.ones_like(of) if weight is None else weight
    try:
        return torch.autograd.grad(of, by, weight, retain_graph=True, create_graph=create_graph, allow_unused=True)[0]
    except (RuntimeError, NotImplementedError) as failure:
        times = "twice" if create_graph else "once"
        raise InvalidField(_TWICE.format(what, times, str(failure).splitlines()[0][:200])) from failure


def _has_leaves(f: Tensor, known: set[Tensor]) -> bool:
    """Return whether f depends on a tensor that requires a gradient, other than the known ones."""
    variables = (getattr(node, "variable", None) for node in _nodes(f))
    return any(variable is not None and variable not in known for variable in variables)


def _nodes(x: Tensor) -> Iterator[Any]:
    """Yield all nodes of the graph of x."""
    seen, pending = set(), [x.grad_fn]
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            pending += [following for following, _ in node.next_functions]
