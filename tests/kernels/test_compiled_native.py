"""Compiled solves, compiled for real. The code is kept in build/tests, so that a second run compiles nothing.

A compilation takes 10 to 30 seconds: `make test` has one of a forward solve, and two of a solve with its backward pass.
`make test-compiled` runs the tests marked `compiled`, too.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from native import CLOSE_IN_FLOAT, Timed, compare, start
from native_gradients import compare_gradients
from problems import F64, linspace
from torch import nn

from node_cuda import solve
from node_cuda.native import build

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compiled_solves")]
ROOT = Path(__file__).resolve().parents[2]
T = linspace(0.0, 1.0, 3)
BOSH3 = dict(method="bosh3", rtol=1e-6, atol=1e-7)
DOPRI5 = dict(BOSH3, method="dopri5")


@pytest.fixture(scope="module")
def folder():
    path = ROOT / "build" / "tests" / "native"
    path.mkdir(parents=True, exist_ok=True)
    return path


@pytest.fixture(autouse=True)
def kept(folder, monkeypatch):
    monkeypatch.setenv("NODE_CUDA_CACHE", str(folder))


SCRIPT = """
import os, sys, torch
from native import Timed, start
from node_cuda import solve
from node_cuda.native import build
torch.set_num_threads(1)
t = torch.linspace(0.0, 1.0, 3, dtype=torch.float64)
solver = dict(method="bosh3", rtol=1e-6, atol=1e-7)
with torch.no_grad():
    eager = solve(Timed(), start(), t, **solver)
    for folder in [os.environ["NODE_CUDA_CACHE"], *sys.argv[1:]]:
        os.environ["NODE_CUDA_CACHE"] = folder
        found = solve(Timed(), start(), t, **solver, options=dict(compile=True))
        assert torch.allclose(found.ys, eager.ys, rtol=1e-12), (found.ys, eager.ys)
        print(build.compilations, found.stats.loop, found.stats.why)
"""


def process(*folders: Path, **environment: str) -> subprocess.Popen[str]:
    """Start a new Python process that does one solve by bosh3, and again with each of these folders for the code."""
    paths = os.pathsep.join(str(path) for path in (ROOT, ROOT / "tests" / "support"))
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *map(str, folders)],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[str, str]:
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out.strip(), err


def test_native_code_takes_the_steps_of_the_host_loop():
    """One compilation serves both directions, other tolerances, other parameters and a solve that fails."""
    field = Timed()
    compare(field, start(), T, **BOSH3)
    compiled = build.compilations
    assert compiled <= 1
    compare(field, start(), T.flip(0), **BOSH3)
    compare(field, 2 * start(), 3 * T, method="bosh3", rtol=1e-7, atol=1e-9, options=dict(first_step=1.0))
    field.load_state_dict({"w": torch.eye(2, dtype=F64)})
    compare(field, start(), T, **BOSH3)
    options = dict(max_num_steps=3, max_step=0.05, throw=False)
    assert torch.isnan(compare(field, start(), T, **{**BOSH3, "rtol": 1e-3}, options=options).ys[-1]).all()
    assert build.compilations == compiled
    two = [Timed(), Timed()]  # another field of the same kind has the same graph
    compare(two[1], start(), T, **BOSH3)
    assert build.compilations == compiled


def test_a_second_process_needs_no_compiler_and_without_the_code_the_host_solves_and_says_what_is_missing(tmp_path):
    test_native_code_takes_the_steps_of_the_host_loop()
    out, err = ended(process(tmp_path, CXX="no-such-compiler"))
    with_code, without = out.splitlines()
    assert with_code == "0 native None" and err.count("Compiling") == 1
    assert without.startswith("0 host ") and "install g++" in without
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.compiled
def test_two_processes_may_compile_the_same_solve_at_once(folder):
    """With the code there, both load it. (In an empty folder both would compile; the later one replaces the file.)"""
    test_native_code_takes_the_steps_of_the_host_loop()
    for one in [process(), process()]:
        out, _ = ended(one)
        assert out == "0 native None"


def test_two_threads_may_call_the_same_code_at_once():
    field, rounds = Timed(), 20
    options = dict(compile="require")

    def ys(y0):
        with torch.no_grad():
            return solve(field, y0, T, **BOSH3, options=options).ys

    states = [start(), -3 * start()]
    expected = [ys(y0) for y0 in states]
    wrong = []

    def many(i):
        wrong.extend(1 for _ in range(rounds) if not torch.equal(ys(states[i]), expected[i]))

    threads = [threading.Thread(target=many, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class Field(nn.Module):
    """A float32 field with a buffer, a time and a small layer."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
        self.register_buffer("scale", torch.tensor([0.5, -1.0]))

    def forward(self, t, y):
        return self.net(torch.cat([y, t.expand(len(y), 1)], 1)) * self.scale


@pytest.mark.compiled
def test_native_code_of_a_grid_in_float32():
    """Products of small matrices, outputs between points of the grid, and tensors of a module."""
    options = dict(step_size=0.07, interp="cubic")
    compare(Field(), start(torch.float32), linspace(0.0, 1.0, 50), method="rk4", options=options, limit=CLOSE_IN_FLOAT)


@pytest.mark.parametrize(
    ("gradient", "method"),
    [
        ("discrete", "midpoint"),
        pytest.param("discrete", "bosh3", marks=pytest.mark.compiled),
        pytest.param("adjoint", "bosh3", marks=pytest.mark.compiled),
    ],
)
def test_native_code_of_a_backward_pass(gradient, method):
    """A second solve with other numbers compiles nothing. The adjoint's forward solve is that of the tests above."""
    backward = dict(adjoint_method="bosh3", adjoint_options={}) if gradient == "adjoint" else {}
    field, compiled = Timed(), []
    for t, tol in ((T, 1e-6), (2 * T, 1e-4)):
        solver = dict(options=dict(step_size=float(t[-1]) / 8)) if method == "midpoint" else dict(rtol=tol, atol=tol)
        compare_gradients(field, start(), t, gradient=gradient, method=method, **solver, **backward)
        compiled.append(build.compilations)
    assert compiled[0] == compiled[1]


class Turning(nn.Module):
    """A complex state, a complex and a real parameter."""

    def __init__(self):
        super().__init__()
        self.h = nn.Parameter(torch.tensor([[1.0, 0.5j], [-0.5j, 2.0]], dtype=torch.complex128))
        self.rate = nn.Parameter(torch.tensor(1.7, dtype=F64))

    def forward(self, t, y):
        return -1j * torch.tanh(self.h @ y) * torch.exp(1j * self.rate * t)


@pytest.mark.compiled
@pytest.mark.parametrize("gradient", ["discrete", "adjoint"])
def test_native_code_of_a_complex_state(gradient):
    """The steps that a loop records are read after it, both parts of them."""
    y0 = torch.tensor([1.0 + 0.5j, -0.3j], dtype=torch.complex128)
    for t in (T, T.flip(0)):
        compare_gradients(Turning(), y0, t, gradient=gradient, method="bosh3", rtol=1e-4, atol=1e-4)


class Flow(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)).double()

    def forward(self, t, state):
        with torch.enable_grad():
            z = state[0].requires_grad_(True)
            dz = self.net(z)
            trace = sum(torch.autograd.grad(dz[:, i].sum(), z, create_graph=True)[0][:, i] for i in range(2))
        return dz, -trace.unsqueeze(1)


def jumps(t, y):
    return torch.where(t < 0.5, -y, 2 * y)


class Convolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.GroupNorm(1, 3)

    def forward(self, t, y):
        return torch.tanh(self.norm(self.conv(y))) * torch.cos(t)


def overwrites(t, y):
    y.mul_(-2.0)
    return y


def reads_a_number(t, y):
    return -y / (1 + y.norm().item())


EACH = torch.tensor([[1e-3, 1e-4], [1e-5, 1e-6], [1e-7, 1e-8]], dtype=F64)
TWO = (start(), torch.zeros(3, 1, dtype=F64))
CASES = {
    "dopri5": lambda: compare(Timed(), start(), T, **DOPRI5),
    "flow": lambda: compare(Flow(), TWO, T, **DOPRI5),
    "jumps": lambda: compare(
        jumps, start(), T, method="bosh3", rtol=1e-4, atol=1e-4, options=dict(jump_t=[0.5], step_t=[0.3])
    ),
    "accurate": lambda: compare(
        Timed(), start(), T, method="tsit5", rtol=1e-5, atol=1e-5, options=dict(dense="accurate")
    ),
    "dopri8": lambda: compare(Timed(), start(), T, method="dopri8", rtol=1e-7, atol=1e-7, limit=1e-9),
    "tolerances": lambda: compare(Timed(), start(), T, rtol=EACH, atol=EACH),
    "clip": lambda: compare(Timed(), start(), T, rtol=1e-5, atol=1e-5, options=dict(clip=True)),
    "heun": lambda: compare(Timed(), start(), T, method="adaptive_heun", rtol=1e-4, atol=1e-4),
    "perturb": lambda: compare(Timed(), start(), T, method="midpoint", options=dict(step_size=0.1, perturb=True)),
    "convolution": lambda: compare(Convolution(), torch.randn(2, 3, 5, 5), T, rtol=1e-4, atol=1e-4, limit=1e-4),
    "in place": lambda: compare(overwrites, start(), T, **DOPRI5),
    "item": lambda: compare(reads_a_number, start(torch.float32), T, method="midpoint", limit=CLOSE_IN_FLOAT),
    "many outputs": lambda: compare(Timed(), start(), linspace(0.0, 1.0, 1000), **DOPRI5),
}


@pytest.mark.compiled
@pytest.mark.parametrize("case", CASES)
def test_native_code_of_further_kinds(case):
    CASES[case]()


@pytest.mark.compiled
def test_processes_that_compile_at_once_in_an_empty_folder(tmp_path):
    found = [ended(one)[0] for one in [process(NODE_CUDA_CACHE=str(tmp_path)) for _ in range(2)]]
    assert all(out.endswith("native None") for out in found)
    assert len(list(tmp_path.glob("*.so"))) == 1
