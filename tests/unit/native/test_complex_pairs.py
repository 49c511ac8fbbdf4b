"""A compiled solve of a complex state takes the steps of the host loop, with the same outputs and gradients.

The graphs run without the compiler here, and without complex tensors. kernels/test_compiled_native.py compiles them.
"""

from __future__ import annotations

import pytest
import torch
from native import CLOSE, CLOSE_IN_FLOAT, compare, first_of, reason
from native_gradients import CLOSE as CLOSE_GRADIENTS
from native_gradients import compare_gradients, gradients
from problems import F64, linspace
from torch import nn

from node_cuda import InvalidField
from node_cuda.native import build
from node_cuda.native.cache import Seen, Then
from node_cuda.native.complex_pairs import as_reals, has_complex, without_complex
from node_cuda.native.tracing import Refused, graph_of, while_loop

pytestmark = pytest.mark.usefixtures("interpreted")

C = torch.complex128
T = linspace(0.0, 2.0, 5)
HEUN = dict(method="adaptive_heun", rtol=1e-3, atol=1e-4)


class Schroedinger(nn.Module):
    """dy/dt = -i H y in a field that turns."""

    def __init__(self, dtype=C):
        super().__init__()
        hamiltonian = [[1.0, 0.5j, 0.1], [-0.5j, 2.0, 0.2 + 0.3j], [0.1, 0.2 - 0.3j, -1.0]]
        self.hamiltonian = nn.Parameter(torch.tensor(hamiltonian, dtype=dtype))
        self.rate = nn.Parameter(torch.tensor(1.7, dtype=dtype.to_real()))

    def forward(self, t, y):
        return -1j * (self.hamiltonian @ y) + 0.3 * torch.exp(1j * self.rate * t) * y


class ModReLU(nn.Module):
    """A complex layer, a smooth modReLU, and a real network that sees both parts."""

    def __init__(self, dtype=torch.complex64):
        super().__init__()
        torch.manual_seed(0)
        real = dtype.to_real()
        self.linear = nn.Linear(3, 3, dtype=dtype)
        self.net = nn.Sequential(nn.Linear(6, 4, dtype=real), nn.Tanh(), nn.Linear(4, 6, dtype=real))
        self.bias = nn.Parameter(torch.tensor(-0.2, dtype=real))

    def forward(self, t, y):
        z = self.linear(y)
        size = z.abs()
        parts = self.net(torch.view_as_real(y).flatten(-2)).unflatten(-1, (3, 2))
        return nn.functional.softplus(size + self.bias) * z / (size + 1e-2) + torch.view_as_complex(parts)


def state(*shape, dtype=C):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------ solves
def test_a_complex_state_takes_the_same_steps_in_both_directions():
    field = Schroedinger()
    for t, y0 in ((T, state(3)), (T.flip(0), state(3).conj())):
        found = compare(field, y0, t, **HEUN, options=dict(first_step=2.0), limit=CLOSE)
        assert found.stats.rejected > 0


@pytest.mark.compiled
def test_a_complex_state_in_single_precision():
    compare(ModReLU(), state(4, 3, dtype=torch.complex64), T.float(), **HEUN, limit=CLOSE_IN_FLOAT)


def test_a_complex_state_on_a_grid():
    compare(Schroedinger(), state(3), T, method="rk4", options=dict(step_size=0.3, interp="cubic"))


@pytest.mark.compiled
def test_a_complex_state_with_the_accurate_interpolant():
    compare(Schroedinger(), state(3), T, method="dopri5", rtol=1e-5, atol=1e-5, options=dict(dense="accurate"))


def test_tolerances_of_a_complex_state_are_of_its_modulus():
    """Parts that oscillate pass zero; their modulus does not. A tolerance of each part would take other steps."""
    each = torch.tensor([1e-2, 1e-3, 1e-4], dtype=F64)
    compare(Schroedinger(), state(3), T, method="adaptive_heun", rtol=each, atol=1e-6)


@pytest.mark.compiled
def test_an_imaginary_number_is_added_to_a_real_tensor():
    compare(lambda t, y: (y.real + 1j) * 0.5 - y, state(3), T, **HEUN)


def test_a_tuple_of_complex_tensors():
    def two(t, y):
        a, b = y
        return 1j * b.sum(-1, keepdim=True) * a, -b * a[0].conj()

    compare(two, (state(2), state(3)), T, **HEUN)


# ------------------------------------------------------------------ gradients
FIELDS = [(Schroedinger, C, (3,), CLOSE_GRADIENTS), (ModReLU, torch.complex64, (4, 3), CLOSE_IN_FLOAT)]


@pytest.mark.parametrize("gradient", ["discrete", "adjoint"])
@pytest.mark.parametrize("field, dtype, shape, limit", first_of(1, FIELDS))
def test_gradients_of_a_complex_state_are_those_of_the_host_loop(gradient, field, dtype, shape, limit):
    """A conjugate in the wrong place would give the conjugate gradient."""
    func, y0 = field(dtype), state(*shape, dtype=dtype)
    t = T.to(dtype.to_real())
    for times in (t, t.flip(0)):
        compare_gradients(func, y0, times, gradient=gradient, limit=limit, **HEUN)


def test_a_complex_parameter_written_through_data_between_the_passes_is_noticed():
    field = Schroedinger()
    then = Then(Seen(field))
    then.refuse_changes(Seen(field), "pass")
    field.hamiltonian.data.mul_(1.5)
    with pytest.raises(InvalidField, match="changed between"):
        then.refuse_changes(Seen(field), "pass")


# ------------------------------------------------------------------ what is refused
def test_an_unknown_operation_is_named_and_the_host_solves():
    why = reason(lambda t, y: torch.fft.fft(y), state(4), T, **HEUN)
    assert why == "func uses aten._fft_c2c.default on complex numbers, for which there is no native code"


@pytest.mark.compiled
def test_only_the_backward_pass_is_by_the_host_where_it_alone_has_an_unknown_operation():
    def made(t, y):
        dy = torch.zeros_like(y)
        dy[0] = 1j * y[1]
        dy[1] = 1j * y[0]
        return dy

    found, _ = gradients(made, state(2), T, gradient="discrete", adjoint_params=(), **HEUN, options=dict(compile=True))
    stats = found.stats
    assert (stats.loop, stats.loop_backward) == ("native", "host")
    assert "aten.new_empty_strided.default" in str(stats.why_backward)


@pytest.mark.parametrize("other", [torch.view_as_real, lambda z: z.conj().imag])
def test_writing_into_a_tensor_that_is_seen_in_another_form_is_refused(other):
    """The two forms are copies here, so that the write would be lost."""

    def written(t, y):
        dy = y * 1j
        other(dy).mul_(2.0)
        return dy

    assert "func writes (aten." in reason(written, state(2), T, **HEUN)


# ------------------------------------------------------------------ the graph
def test_a_real_state_with_complex_numbers_in_the_field_has_a_graph_without_them(monkeypatch):
    seen = []
    native = build.native

    def looked_at(graph, examples, what):
        seen.append(has_complex(graph) or any(x.is_complex() for x in examples))
        return native(graph, examples, what)

    monkeypatch.setattr(build, "native", looked_at)
    turn = torch.tensor([1j, -0.5j], dtype=C)
    compare(lambda t, y: torch.view_as_real(torch.view_as_complex(y) * turn), torch.view_as_real(state(2)), T, **HEUN)
    assert seen == [False]


def test_a_loop_carries_and_writes_both_parts():
    def run(z, n):
        record = torch.zeros(4, 2, dtype=C)

        def body(i, z, record, n):
            record.index_copy_(0, i.reshape(1), z.unsqueeze(0))
            return [i + 1, z * 1j + 1]

        start = [torch.zeros((), dtype=torch.long), z.clone()]
        _, z = while_loop(lambda i, z, record, n: i < n, body, start, [record, n], [0])
        return z, record

    z, n = state(2), torch.tensor(3)
    with torch.no_grad():
        graph, again = without_complex(graph_of(run, [z, n]), [z, n])
    assert not has_complex(graph)
    end, record = again(graph(*as_reals([z, n])))
    expected = [z]
    for _ in range(3):
        expected.append(expected[-1] * 1j + 1)
    torch.testing.assert_close(torch.cat([record[:3], end[None]]), torch.stack(expected), rtol=1e-15, atol=1e-15)
    assert not record[3].any()


def test_a_complex_result_where_torch_has_a_real_one_is_refused():
    def run(z, x):
        return [x.clone().copy_(z)]

    z = state(2)
    with pytest.raises(Refused, match="real result"), torch.no_grad():
        without_complex(graph_of(run, [z, z.real.clone()]), [z, z.real.clone()])
