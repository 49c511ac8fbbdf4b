"""A field that changed between the forward and the backward pass: the check compares its values, not its attributes."""

from __future__ import annotations

import math
import threading
import warnings

import pytest
import torch
from problems import F64, MLP, Counting, loss_of, relative_difference
from torch import nn
from torch.utils.checkpoint import checkpoint

import node_cuda
from node_cuda import InvalidField, odeint, odeint_adjoint
from node_cuda.gradients import changed

MODES = ("adjoint", "discrete")
both = pytest.mark.parametrize("mode", MODES)
Y = torch.tensor([[1.0], [0.5], [0.25]], dtype=F64)
TIGHT = dict(rtol=1e-8, atol=1e-8)
CLOSE = 1e-5  # for gradients of solves with tolerance 1e-8
REFUSED = "func was changed between the forward and the backward pass"


class Graph(nn.Module):
    """z' = k (w A z - z), of which A and k are set from outside: z(1) = exp(k (w - 1)) z(0) for A = 1."""

    def __init__(self, A=1.0, k=1.0):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.5, dtype=F64))
        self.A = A * torch.eye(3, dtype=F64)
        self.k = k
        self.register_buffer("scale", torch.ones(3, 1, dtype=F64))

    def forward(self, t, z):
        return self.k * self.scale * (self.w * self.A @ z - z)

    def gradient(self, k=1.0, y=Y):
        """d sum z(1) / dw."""
        return k * math.exp(k * (self.w.item() - 1)) * y.sum().item()


def unit(n=2, dtype=F64):
    return torch.linspace(0.0, 1.0, n, dtype=dtype)


def last(f, mode, t=None, y=Y, **options):
    return odeint_adjoint(f, y, unit() if t is None else t, gradient=mode, **{**TIGHT, **options})[-1]


def silently(work):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return work()


def close(x, truth, limit=CLOSE):
    return abs(float(x) - truth) <= limit * abs(truth)


# ------------------------------------------------------------------ put back
@both
def test_a_graph_that_is_switched_for_each_interval_has_the_right_gradient(mode):
    """torchdiffeq#224: z = exp(sum_k (w k - 1)) in each component, d sum z / dw = 3 * 6 * exp(6 w - 3) = 18."""
    f, z = Graph(), torch.ones(3, 1, dtype=F64)
    for k in range(3):
        f.A = torch.eye(3, dtype=F64) * (k + 1)
        z = last(f, mode, torch.tensor([float(k), k + 1.0], dtype=F64), z)
    z.sum().backward()
    assert close(f.w.grad, 18.0)
    assert torch.equal(f.A, 3 * torch.eye(3, dtype=F64)), "the user's is there again"


class Hutchinson(nn.Module):
    """FFJORD's field: (z, log p)' = (w z, -e^T w e / |e|^2 ...) with the noise e of this solve; z(1) = e^w z(0)."""

    def __init__(self, lazily):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.5, dtype=F64))
        self.lazily, self.e = lazily, None

    def before_odeint(self):
        self.e = None if self.lazily else torch.randn(4, dtype=F64)

    def forward(self, t, state):
        if self.e is None:
            self.e = torch.randn(4, dtype=F64)
        z, _ = state
        return self.w * z, -(self.w * self.e.square()).sum().expand(1)


@both
@pytest.mark.parametrize("lazily", [False, True])
def test_new_noise_for_each_of_two_solves_and_one_backward_pass_is_right(mode, lazily):
    """d/dw of the sum of z(1) and of -w |e|^2 over both solves."""
    f, total, truth = Hutchinson(lazily), 0.0, 0.0
    for _ in range(2):
        f.before_odeint()
        z, trace = odeint_adjoint(f, (Y, torch.zeros(1, dtype=F64)), unit(), gradient=mode, **TIGHT)
        total = total + z[-1].sum() + trace[-1].sum()
        truth += math.exp(0.5) * Y.sum().item() - f.e.square().sum().item()
    total.backward()
    assert close(f.w.grad, truth)


@both
def test_a_hypernetwork_that_sets_weights_before_each_solve_is_right(mode):
    """z' = v z with v = h x, set before each solve: d sum z(1)/dh = sum over x of x exp(h x) sum z(0)."""

    class Main(nn.Module):
        def forward(self, t, z):
            return self.v * z

    f, h, total, truth = Main(), torch.tensor(0.5, dtype=F64, requires_grad=True), 0.0, 0.0
    for x in (1.0, -0.5):
        f.v = h * x
        total = total + last(f, mode, adjoint_params=(f.v,)).sum()
        truth += x * math.exp(0.5 * x) * Y.sum().item()
    total.backward()
    assert close(h.grad, truth)


@both
@pytest.mark.parametrize("method", ["rk4", "adaptive_heun"])
def test_a_replaced_tensor_is_put_back_with_every_method(mode, method):
    f = Graph()
    options = dict(options=dict(step_size=0.05)) if method == "rk4" else dict(rtol=1e-6, atol=1e-6)
    z = last(f, mode, method=method, **options)
    f.A = 2 * f.A
    z.sum().backward()
    assert close(f.w.grad, f.gradient(), 1e-4), "to the tolerance, and to h^4"


@both
def test_the_tensor_of_a_plain_object_is_put_back_too(mode):
    class Plain:
        A = 1.0

        def rhs(self, t, z):
            return self.A * z * w

    f, w = Plain(), torch.tensor(0.5, dtype=F64, requires_grad=True)
    f.A = torch.ones((), dtype=F64)
    z = last(f.rhs, mode, adjoint_params=(w,))
    del f.A
    z.sum().backward()
    assert close(w.grad, math.exp(0.5) * Y.sum().item()) and f.A == 1.0


@both
def test_after_an_error_func_has_the_users_tensors_again(mode):
    class Failing(Graph):
        fails = False

        def forward(self, t, z):
            if self.fails:
                raise KeyError("in the backward pass")
            return super().forward(t, z)

    f = Failing()
    z = last(f, mode)
    f.A = mine = 2 * f.A
    Failing.fails = True
    with pytest.raises(KeyError):
        z.sum().backward()
    assert f.A is mine


def test_two_backward_passes_of_one_field_in_two_threads_do_not_mix_their_tensors():
    f, solved = Graph(), []
    for k in (1.0, 2.0, 3.0):
        f.A = k * torch.eye(3, dtype=F64)
        solved.append((k, last(f, "adjoint").sum()))
    f.A = torch.zeros_like(f.A)
    found = {}

    def work(k, z):
        found[k] = torch.autograd.grad(z, f.w)[0].item()

    threads = [threading.Thread(target=work, args=one) for one in solved]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(close(found[k], k * math.exp(0.5 * k - 1) * Y.sum().item()) for k, _ in solved)


def test_a_log_of_earlier_solutions_on_the_field_does_not_keep_their_graphs():
    import weakref

    f, nodes = Graph(), []
    for _ in range(3):
        f.log = last(f, "adjoint")
        nodes.append(weakref.ref(f.log))
    assert [node() is None for node in nodes] == [True, True, False]


# ------------------------------------------------------------------ refused
def changed_number(f):
    f.k = 2.0


def written_buffer(f):
    f.scale.mul_(2)


def written_attribute(f):
    f.A.mul_(2)


def data_of_a_parameter(f):
    f.w.data = f.w.data * 2


CHANGES = {
    "func.k was 1.0 and is 2.0": changed_number,
    "func.scale was written in place": written_buffer,
    "func.A was written in place": written_attribute,
    "No attribute tells why": data_of_a_parameter,
}
SOLVES = {
    "between two steps": {},
    "at the end of a step": dict(options=dict(step_t=unit())),
    "loose": dict(rtol=1e-3, atol=1e-4),
    "backwards": dict(t=unit().flip(0)),
    "many outputs": dict(t=unit(7)),
    "tsit5": dict(method="tsit5"),
    "bosh3": dict(method="bosh3", rtol=1e-5, atol=1e-5),
    "dopri8": dict(method="dopri8"),
}


@both
@pytest.mark.parametrize("words", CHANGES)
def test_a_change_of_its_values_is_refused_and_named(mode, words):
    f = Graph()
    z = last(f, mode)
    CHANGES[words](f)
    with pytest.raises(InvalidField, match=REFUSED) as error:
        z.sum().backward()
    assert words in str(error.value) and f'gradient="{mode}"' in str(error.value)


@both
@pytest.mark.parametrize("arguments", SOLVES.values(), ids=SOLVES)
def test_a_change_is_refused_for_a_last_output_at_any_time(mode, arguments):
    f = Graph()
    z = last(f, mode, **arguments)
    f.k = 2.0
    with pytest.raises(InvalidField, match=REFUSED):
        z.sum().backward()


IMPLICIT = {
    "rodas5p": {},
    "kvaerno5": {},
    "trapezoid": dict(options=dict(step_size=0.1)),
    "sdirk2": dict(options=dict(step_size=0.1)),
    "gl4": dict(options=dict(step_size=0.1)),
}


@both
@pytest.mark.parametrize("method", IMPLICIT)
def test_a_change_is_refused_with_an_implicit_method_and_none_is_seen_where_there_is_none(mode, method):
    """One more evaluation in the backward pass, at a point of the last step where the forward pass made one."""
    arguments = dict(rtol=1e-6, atol=1e-6, method=method, **IMPLICIT[method])
    f = Graph()
    last(f, mode, **arguments).sum().backward()
    assert close(f.w.grad, f.gradient(), 1e-2)
    for change in CHANGES.values():
        f = Graph()
        z = last(f, mode, **arguments)
        change(f)
        with pytest.raises(InvalidField, match=REFUSED):
            z.sum().backward()


@both
@pytest.mark.parametrize("method", ["rk4", "adaptive_heun", "fehlberg2", "explicit_adams", "implicit_adams"])
def test_without_a_stage_to_compare_a_buffer_that_was_written_is_refused(mode, method):
    if mode == "discrete" and method.endswith("adams"):
        mode = "adjoint"
    f = Graph()
    options = {} if method in ("adaptive_heun", "fehlberg2") else dict(options=dict(step_size=0.1))
    z = last(f, mode, method=method, **{**options, "rtol": 1e-6, "atol": 1e-6})
    f.scale.mul_(2)
    with pytest.raises(InvalidField, match=REFUSED):
        z.sum().backward()


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.complex128])
def test_a_change_is_seen_in_every_precision(mode, dtype):
    f = Graph().to(dtype.to_real() if dtype.is_complex else dtype)
    f.A = f.A.to(dtype)
    z = last(f, mode, unit(dtype=torch.float32), Y.to(dtype), rtol=1e-3, atol=1e-3)
    f.k = 3.0
    with pytest.raises(InvalidField, match=REFUSED):
        z.abs().sum().backward()


@both
def test_a_change_is_refused_again_in_a_second_backward_pass_and_after_an_event(mode):
    f = Graph()
    z = last(f, mode)
    z.sum().backward(retain_graph=True)
    assert close(f.w.grad, f.gradient())
    f.k = 2.0
    with pytest.raises(InvalidField, match=REFUSED):
        z.sum().backward()
    f.k = 1.0
    z.sum().backward()
    assert close(f.w.grad, 2 * f.gradient()), "the third is right"
    _, ys = odeint_adjoint(f, Y, unit(), event_fn=lambda t, z: z[0] - 0.8, gradient=mode, **TIGHT)
    f.k = 2.0
    with pytest.raises(InvalidField, match=REFUSED):
        ys[-1].sum().backward()


@both
def test_a_change_below_the_noise_of_the_solve_is_accepted(mode):
    """The change is less than a hundredth of the tolerance, or less than 100 roundings."""
    for by, arguments in ((1e-7, dict(rtol=1e-3, atol=1e-3)), (1e-14, dict(rtol=1e-12, atol=1e-12))):
        f = Graph()
        z = last(f, mode, options=dict(step_t=unit()), **arguments)
        f.k += by
        silently(lambda z=z: z.sum().backward())


# ------------------------------------------------------------------ not refused
class Counters(MLP):
    def __init__(self):
        super().__init__(dim=3, hidden=4)
        self.nfe, self.seen, self.cache = 0, [], {}
        self.tensor_count = torch.zeros(())
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, t, y):
        self.nfe += 1
        self.tensor_count = self.tensor_count + 1
        self.count += 1
        self.seen.append(float(t))
        self.cache["last"] = y.detach()
        self.last = y.detach()
        return super().forward(t, y)


class Normalized(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(3, 3, dtype=F64), nn.BatchNorm1d(3, dtype=F64)

    def forward(self, t, y):
        return torch.tanh(self.norm(self.linear(y)))


class Spectral(nn.Module):
    def __init__(self, old):
        super().__init__()
        normed = nn.utils.spectral_norm if old else nn.utils.parametrizations.spectral_norm
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.linear = normed(nn.Linear(3, 3, dtype=F64))

    def forward(self, t, y):
        return torch.tanh(self.linear(y))


FAIR = {
    "counters, caches and logs": Counters,
    "BatchNorm in training": Normalized,
    "BatchNorm in evaluation": lambda: Normalized().eval(),
    "spectral norm in evaluation": lambda: Spectral(False).eval(),
    "the old spectral norm in evaluation": lambda: Spectral(True).eval(),
}
METHODS = {
    "dopri5": {},
    "exact end": dict(options=dict(step_t=unit())),
    "rk4": dict(method="rk4", options=dict(step_size=0.1)),
}
BATCH = torch.randn(6, 3, generator=torch.Generator().manual_seed(2), dtype=F64)


def train_mode(f):
    f.eval()


def fixed(f):
    f.requires_grad_(False)


def averaged(f):
    """Use an exponential moving average of the weights for an evaluation, and restore the weights."""
    saved = [p.data.clone() for p in f.parameters()]
    for p in f.parameters():
        p.data.copy_(p.data * 0.9)
    f(torch.zeros((), dtype=F64), BATCH)
    for p, own in zip(f.parameters(), saved, strict=True):
        p.data.copy_(own)


@both
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", FAIR)
def test_values_that_a_field_writes_itself_are_no_change(mode, method, kind):
    """There are two solves, and one backward pass of both."""
    torch.manual_seed(1)
    f = FAIR[kind]()
    loss = sum(loss_of(silently(lambda: last(f, mode, y=BATCH, **METHODS[method]))) for _ in range(2))
    silently(loss.backward)
    ours = [p.grad.clone() for p in f.parameters()]
    truth = torch.autograd.grad(
        2 * loss_of(odeint(f, BATCH, unit(), **{**TIGHT, **METHODS[method]})[-1]), list(f.parameters())
    )
    limit = 1e-3 if method == "rk4" else CLOSE  # h^4 in the adjoint
    assert relative_difference(tuple(ours), tuple(truth)) < limit


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("old", [False, True])
def test_spectral_norm_in_training_works_as_before_in_the_adjoint(method, old):
    """Each evaluation iterates the vectors of the norm, so that its values change a little each time."""
    torch.manual_seed(1)
    f = Spectral(old).train()
    z = last(f, "adjoint", y=BATCH, **METHODS[method])
    silently(z.sum().backward)


@both
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("then", [train_mode, fixed, averaged])
def test_an_action_that_keeps_the_values_is_no_change(mode, method, then):
    f = MLP(dim=3, hidden=4)
    z = last(f, mode, y=BATCH, **METHODS[method])
    then(f)
    silently(z.sum().backward)
    truth = MLP(dim=3, hidden=4)
    odeint(truth, BATCH, unit(), **{**TIGHT, **METHODS[method]})[-1].sum().backward()
    if then is not fixed:
        limit = 1e-3 if method == "rk4" else CLOSE
        grads = (tuple(p.grad for p in net.parameters()) for net in (f, truth))
        assert relative_difference(*grads) < limit


@both
def test_a_buffer_that_was_written_and_restored_is_no_change(mode):
    for method in ("dopri5", "rk4"):
        f = Graph()
        z = last(f, mode, method=method)
        own = f.scale.clone()
        f.scale.mul_(3)
        f.scale.copy_(own)
        silently(z.sum().backward)


@both
def test_a_recurrent_cell_between_solves_is_right(mode):
    """In a GRU-ODE, a solve moves the hidden state from one input to the next, and the cell adds the input."""

    class GRUODE(nn.Module):
        def __init__(self, solver, **arguments):
            super().__init__()
            torch.manual_seed(4)
            self.flow, self.cell = MLP(dim=3, hidden=4), nn.GRUCell(2, 3, dtype=F64)
            self.solver, self.arguments = solver, arguments

        def forward(self, x):
            h = x.new_zeros(x.shape[1], 3)
            for xk in x:
                h = self.cell(xk, self.solver(self.flow, h, unit(), **TIGHT, **self.arguments)[-1])
            return h.square().sum()

    x = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(3), dtype=F64)
    nets = GRUODE(odeint_adjoint, gradient=mode), GRUODE(odeint)
    for net in nets:
        silently(net(x).backward)
    assert relative_difference(*(tuple(p.grad for p in net.parameters()) for net in nets)) < CLOSE


@both
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_solve_in_a_checkpoint_is_right(mode, reentrant):
    f, y = Graph(), Y.clone().requires_grad_(True)
    z = checkpoint(lambda y: last(f, mode, y=y), y, use_reentrant=reentrant)
    silently(z.sum().backward)
    assert close(f.w.grad, f.gradient())


@both
def test_a_checkpoint_and_a_solve_in_the_field_are_right(mode):
    """z' = w k(z) z with k = 1 from an inner solve over no change, computed in a checkpoint."""

    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor(0.5, dtype=F64))

        def forward(self, t, z):
            one = odeint(lambda s, x: -x, torch.ones_like(z), torch.tensor([0.0, 1e-9], dtype=F64), method="rk4")[0]
            return checkpoint(lambda z: self.w * one * z, z, use_reentrant=False)

    f = Nested()
    silently(last(f, mode).sum().backward)
    assert close(f.w.grad, math.exp(0.5) * Y.sum().item())


@both
def test_another_order_of_the_operations_and_autocast_are_no_change(mode):
    """The backward pass records a graph, and a field may then use another kernel."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(32, 32)

        def forward(self, t, y):
            if not torch.is_grad_enabled():
                y = y.flip(-1)
                weight = self.linear.weight.flip(-1)
                return torch.tanh(nn.functional.linear(y, weight, self.linear.bias))
            return torch.tanh(self.linear(y))

    y = torch.randn(4, 32)
    for low in (False, True):
        f = Two()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
            z = odeint_adjoint(f, y, torch.tensor([0.0, 1.0]), rtol=1e-4, atol=1e-4, gradient=mode)[-1]
        silently(z.sum().backward)


@both
def test_functional_call_is_no_change(mode):
    net = nn.Module()
    net.field = Graph()
    net.forward = lambda: last(net.field, mode).sum()
    given = {"field.w": torch.tensor(0.25, dtype=F64, requires_grad=True), "field.scale": torch.ones(3, 1, dtype=F64)}
    silently(torch.func.functional_call(net, given, ()).backward)
    assert close(given["field.w"].grad, math.exp(-0.75) * Y.sum().item())


def test_a_random_field_keeps_its_warning_and_costs_no_more_evaluations():
    class Noisy(Graph):
        def forward(self, t, z):
            return super().forward(t, z) + 0.1 * torch.randn_like(z)

    f = Counting(Noisy())
    with pytest.warns(UserWarning, match="func is non-deterministic: a second call at the same t and y differs"):
        z = last(f, "adjoint", method="rk4", options=dict(step_size=0.25))
    silently(z.sum().backward)
    assert f.nfe == 16 + 1 + 16, "the look that found it, and nothing besides"


@both
@pytest.mark.parametrize("arguments", SOLVES.values(), ids=SOLVES)
def test_the_comparison_costs_no_evaluation_of_func(mode, arguments, monkeypatch):
    def evaluations():
        f = Counting(MLP(dim=3, hidden=4))
        last(f, mode, y=BATCH, **arguments).sum().backward()
        return f.nfe

    with_look = evaluations()
    monkeypatch.setattr(changed.LastStep, "evaluated", lambda *_: None)
    monkeypatch.setattr(changed.Comparison, "differ", lambda *_: False)
    assert with_look == evaluations()


@both
def test_the_kernels_path_refuses_a_change_and_puts_a_tensor_back(mode, shim):
    with node_cuda.backend("fused"):
        f = Graph()
        z, again = last(f, mode), last(f, mode)
        f.A = 2 * f.A
        silently(z.sum().backward)
        assert close(f.w.grad, f.gradient())
        f.k = 2.0
        with pytest.raises(InvalidField, match=REFUSED):
            again.sum().backward()


@both
def test_a_captured_solve_puts_a_replaced_tensor_back(mode, eager):
    """Its steps are not compared. The fingerprint finds other changes, and func is then captured again."""
    f = Graph()
    for _ in range(2):  # the second solve replays the capture of the first one
        f.w.grad, f.A = None, torch.eye(3, dtype=F64)
        z = last(f, mode, options=dict(cuda_graph=True))
        f.A = 2 * f.A
        silently(z.sum().backward)
        assert close(f.w.grad, f.gradient())
