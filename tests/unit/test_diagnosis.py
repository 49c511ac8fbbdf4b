"""diagnose: what it recommends for problems whose answer is known."""

from __future__ import annotations

import re

import pytest
import torch
from problems import F64, MLP, linspace
from torch import nn

import node_cuda
from node_cuda import InvalidInput, SolveError, diagnose

Y = torch.tensor([[0.7, -0.4], [0.1, 0.2]])
T = linspace(0.0, 1.0, 3).float()


@pytest.fixture(scope="module")
def of_a_network():
    func = MLP(dim=2).float()
    return func, diagnose(func, Y, T)


def test_a_smooth_field_gets_the_loosest_tolerance_that_reaches_the_error(of_a_network):
    _, found = of_a_network
    assert [run.name for run in found.solves] == ["dopri5, 0.01", "dopri5, 0.0001", "dopri5, 1e-06"]
    reached = [tol for tol, run in zip((1e-2, 1e-4, 1e-6), found.solves, strict=True) if run.error <= 1e-3]
    assert found.tolerance == reached[0] and not found.stiff
    assert found.line == f'node_cuda.solve(func, y0, t, rtol={reached[0]:g}, atol={reached[0]:g}, gradient="auto")'


def test_every_gradient_mode_is_compared_with_a_tight_solve(of_a_network):
    """The modes differentiate one solve, whose error is at most that of the loosest tolerance."""
    _, found = of_a_network
    assert [run.name for run in found.gradients] == ["discrete", "adjoint", "backprop"]
    assert all(0 < run.error < 0.05 and run.seconds > 0 for run in found.gradients)
    by = {run.name: run for run in found.gradients}
    assert by["discrete"].error == pytest.approx(by["backprop"].error, rel=0.1)  # the same steps, in single precision


class Root(nn.Module):
    """dy/dt has no real value where t > 0.5."""

    def forward(self, t, y):
        return torch.sqrt(0.5 - t) + 0 * y


ONE = torch.ones(1, dtype=F64)

# name: (func, y0, t, options, words of the notes or, after "Use:", of the line)
FIELDS = {
    "a network": (MLP(dim=2).float(), Y, T, None, "Use:"),
    "one that jumps": (lambda t, y: torch.where(t < 0.3, -y, y + 1), ONE, T, None, "Use:"),
    "one whose jump is named": (
        lambda t, y: torch.where(t < 0.3, -y, y + 1),
        ONE,
        T,
        dict(jump_t=[0.3]),
        "Use:.*, options=options",
    ),
    "one that becomes infinite": (lambda t, y: y * y, ONE, 2 * T, None, "seems to become infinite near t = 1: .* 1 to"),
    "NaN at the start": (lambda t, y: torch.sqrt(-y), ONE, T, None, r"NaN or infinite at t = 0. Look at `y0`"),
    "NaN later": (Root(), torch.ones(1), T, None, "returns NaN or infinity near t = 0.5.* Check func there"),
    "too many steps": (lambda t, y: y, ONE, T, dict(max_num_steps=1), r"came to the end.*max_num_steps=\.\.\."),
    "a slope that becomes infinite": (
        lambda t, y: -0.2 * y**-9,
        ONE,
        T,
        dict(max_num_steps=300),
        "step size goes to zero near t = 0.5",
    ),
    "too large for its dtype": (
        lambda t, y: 40 * y,
        torch.ones(1),
        4 * T,
        None,
        r"infinite near t = 2.*In double precision.*y0.double\(\)",
    ),
}


@pytest.mark.parametrize("name", FIELDS)
def test_a_line_works_when_it_is_typed_and_a_problem_that_fails_gets_none(name):
    func, y0, t, options, words = FIELDS[name]
    found = diagnose(func, y0, t, options=options)
    assert re.search(words, repr(found).replace("\n", " ")), found
    typed = found.line or "node_cuda.solve(func, y0, t, options=options, adjoint_params=())"
    names = {"node_cuda": node_cuda, "func": func, "y0": y0, "t": t, "options": options}
    if words.startswith("Use:"):
        assert found.line and eval(typed, names).ys.shape == (3, *y0.shape)
        return
    assert found.line is None and not found.stiff and not found.gradients and "Use:" not in repr(found)
    with pytest.raises(SolveError):
        eval(typed, names)


def test_it_reads_as_a_report(of_a_network):
    _, found = of_a_network
    text = repr(found)
    assert text.splitlines()[0] == "Steps at three tolerances, and the error of y:"
    for words in ("dopri5, 1e-06", "discrete", "func is not stiff here.", "dopri5 at 1e-12 in double precision"):
        assert words in text
    assert text.endswith(f"Use:\n    {found.line}")


def test_it_leaves_no_trace_in_the_users_tensors_and_random_numbers():
    class Drawing(MLP):
        """Draws a number, and does not use it."""

        def forward(self, t, y):
            torch.rand(())
            return super().forward(t, y)

    func, y0 = Drawing(dim=2).float(), Y.clone().requires_grad_()
    torch.manual_seed(5)
    diagnose(func, y0, T)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))
    assert y0.grad is None and all(p.grad is None and p.dtype == torch.float32 for p in func.parameters())


def test_a_stiff_field_gets_an_implicit_method():
    def stiff(t, y):
        return -2000 * (y - torch.cos(t))

    found = diagnose(stiff, torch.zeros(1, dtype=F64), linspace(0.0, 1.0, 2))
    assert found.stiff and found.implicit and found.line
    assert found.implicit.accepted < min(run.accepted for run in found.solves) / 5
    assert 'method="rodas5p"' in found.line and found.line.endswith("adjoint_params=())")
    assert any("func is stiff" in note for note in found.notes)
    assert eval(found.line, {"node_cuda": node_cuda, "func": stiff, "y0": torch.zeros(1, dtype=F64), "t": T.double()})


def test_a_solve_that_fails_is_a_line_of_the_report():
    def blows_up(t, y):
        return y * y

    found = diagnose(blows_up, torch.ones(1, dtype=F64), linspace(0.0, 2.0, 2), options=dict(max_num_steps=200))
    assert all(run.failure for run in found.solves)
    assert found.reference.startswith("nothing: no solve came to the end")
    assert str(found.solves[0].failure) in repr(found)


def test_a_field_without_double_precision_has_no_reference():
    class Single(nn.Module):
        def forward(self, t, y):
            return -y @ torch.eye(2)  # which is float32

    found = diagnose(Single(), Y, T)
    assert "func does not compute in double precision" in found.reference
    assert all(run.error is None and run.accepted for run in found.solves)


def test_wrong_arguments_are_refused():
    with pytest.raises(InvalidInput, match="error must be a relative error between 0 and 1"):
        diagnose(MLP(dim=2), Y.double(), T, error=2.0)
    with pytest.raises(InvalidInput, match=r"got y0 of torch.bfloat16. Use y0.float\(\)"):
        diagnose(MLP(dim=2), Y.bfloat16(), T)
