"""The names of torchdiffeq._impl: those that compute have torchdiffeq's results, the others say what to use."""

from __future__ import annotations

import pytest
import torch
from problems import F64
from torch import nn
from torchdiffeq._impl import dopri5, event_handling, interp, misc, rk_common

from node_cuda import Unsupported, odeint
from node_cuda.as_torchdiffeq import names
from node_cuda.methods.registry import ELSEWHERE, METHODS

Y = torch.tensor([[0.7, -0.4], [0.1, 0.2]], dtype=F64)
T = torch.tensor([0.0, 0.5, 1.0], dtype=F64)


def numbers(seed, *shapes):
    made = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=made, dtype=F64) for shape in shapes]


def close(found, truth):
    return torch.allclose(found, truth, rtol=1e-13, atol=1e-13)  # sums in another order


def test_the_interpolant_is_that_of_torchdiffeq():
    y0, y1, mid, f0, f1 = numbers(0, *[(3, 2)] * 5)
    ours, theirs = (module._interp_fit(y0, y1, mid, f0, f1, T[1]) for module in (names, interp))
    assert all(close(a, b) for a, b in zip(ours, theirs, strict=True))
    for x in (0.0, 0.3, 1.0):
        at = torch.tensor(x, dtype=F64)
        assert close(names._interp_evaluate(ours, T[0], T[2], at), interp._interp_evaluate(theirs, T[0], T[2], at))
    with pytest.raises(AssertionError, match="t must lie within the step"):
        names._interp_evaluate(ours, T[0], T[1], T[2])


def test_the_coefficients_of_dopri5_are_those_of_torchdiffeq():
    ours, theirs = names._DORMAND_PRINCE_SHAMPINE_TABLEAU, dopri5._DORMAND_PRINCE_SHAMPINE_TABLEAU
    assert ours._fields == theirs._fields
    assert close(ours.alpha, theirs.alpha) and close(ours.c_sol, theirs.c_sol) and close(ours.c_error, theirs.c_error)
    assert all(close(a, b) for a, b in zip(ours.beta, theirs.beta, strict=True))
    assert close(names.DPS_C_MID, dopri5.DPS_C_MID) and names.Dopri5Solver.order == dopri5.Dopri5Solver.order


def test_parts_norms_and_steps_are_those_of_torchdiffeq():
    flat, shapes = numbers(1, (3, 7))[0], [torch.Size([2, 2]), torch.Size([]), torch.Size([2])]
    for ours, theirs in zip(
        names._flat_to_shape(flat, (3,), shapes), misc._flat_to_shape(flat, (3,), shapes), strict=True
    ):
        assert torch.equal(ours, theirs)
    parts = numbers(2, (4,), (2, 2))
    assert close(names._rms_norm(parts[0]), misc._rms_norm(parts[0]))
    assert names._mixed_norm(parts) == pytest.approx(float(misc._mixed_norm(parts)), rel=1e-14)
    assert names._mixed_norm(()) == misc._mixed_norm(())

    def func(t, y, perturb=None):
        return torch.sin(t) * y - (0.1 if getattr(perturb, "name", "NONE") == "NEXT" else 0.0)

    for perturb in (False, True):
        ours, theirs = (
            module.rk4_alt_step_func(func, T[0], T[1], T[1], Y, perturb=perturb) for module in (names, rk_common)
        )
        assert close(ours, theirs)
    assert [side.name for side in names.Perturb] == [side.name for side in misc.Perturb]


def test_an_event_is_found_where_torchdiffeq_finds_it():
    def run(find):
        sign0 = torch.ones((), dtype=F64)
        return find(lambda t: torch.cos(2 * t), sign0, T[0], T[2], lambda t, y: y, torch.tensor(1e-9, dtype=F64))

    (ours, at), (theirs, _) = run(names.find_event), run(event_handling.find_event)
    assert abs(float(ours - theirs)) < 1e-9 and abs(float(at)) < 1e-8


def test_the_parameters_of_a_module_and_of_a_replica_are_found():
    module = nn.Linear(2, 2)
    assert names.find_parameters(module) == list(module.parameters())
    replica = module._replicate_for_data_parallel()
    replica.weight = module.weight * 1.0
    assert any(x is replica.weight for x in names.find_parameters(replica))


def test_a_solver_class_may_be_derived_from_and_says_what_to_use_when_it_is_made():
    class Mine(names.FixedGridODESolver):
        order = 1

        def __init__(self, **kwargs):
            self.kwargs = kwargs

    with pytest.raises(Unsupported, match=r"Mine is a solver class of torchdiffeq.*`node_cuda.register_method`"):
        Mine(func=None, y0=Y)
    with pytest.raises(Unsupported, match=r"Use `odeint_adjoint\(func, y0, t, adjoint_params"):
        names.OdeintAdjointMethod.apply(1, 2)
    with pytest.raises(Unsupported, match="_check_inputs prepares the arguments"):
        names._check_inputs(None, Y, T)


def test_a_method_that_was_added_to_solvers_is_refused_with_a_sentence_when_it_is_used():
    solvers = names._Solvers()
    assert set(METHODS) <= set(solvers) and solvers["dopri5"] is names.Dopri5Solver
    solvers["mine"] = solvers["euler"]
    try:
        with pytest.raises(ValueError, match=r'Invalid method "mine".*was added to torchdiffeq\'s SOLVERS.*register_m'):
            odeint(lambda t, y: -y, Y, T, method="mine")
    finally:
        solvers.forget()
    assert "mine" not in ELSEWHERE
