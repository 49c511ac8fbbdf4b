"""A typical user's program passes a type checker, and a mistake in it does not."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
# pyright: strict
import torch
from torch import Tensor, nn
from typing_extensions import assert_type

from node_cuda import NeuralODE, odeint, odeint_adjoint, odeint_dense, odeint_event, solve


class Field(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 2)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(self.net(y))


Pair = tuple[Tensor, ...]


def pair(t: Tensor, state: Pair) -> Pair:
    return -state[0], state[1]


def crossing(t: Tensor, y: Tensor) -> Tensor:
    return y[0] - 0.5


field, y0, t = Field(), torch.ones(2), torch.linspace(0, 1, 5)

solution = solve(field, y0, t, rtol=1e-5, method="dopri5", gradient="discrete", checkpoints="auto")
mean: Tensor = solution.ys.mean()
evaluations: int = solution.stats.nfe + solution.stats.nfe_backward
assert_type(solution.y_reached, Tensor)
assert_type(solve(pair, (y0, y0), t).ys[0], Tensor)
assert_type(solve(pair, (y0, y0), t).check().ys, Pair)

assert_type(odeint(field, y0, t, atol=1e-6, options=dict(clip=True)), Tensor)
assert_type(odeint(pair, (y0, y0), t), Pair)
assert_type(odeint(field, y0, t[:2], event_fn=crossing), tuple[Tensor, Tensor])
assert_type(odeint_adjoint(field, y0, t, adjoint_params=tuple(field.parameters())), Tensor)
assert_type(odeint_adjoint(pair, (y0, y0), t, adjoint_params=(), adjoint_method="rk4", adjoint_options={}), Pair)

event_t, ys = odeint_event(field, y0, t[0], event_fn=crossing, odeint_interface=odeint_adjoint, rtol=1e-5)
later: Tensor = event_t + ys[-1].sum()

dense = odeint_dense(field, y0, 0.0, 1.0)
assert_type(dense(0.5), Tensor)
assert_type(odeint_dense(pair, (y0, y0), t[0], t[-1])(t), Pair)

layer = NeuralODE(field, t, last_only=True, method="tsit5", gradient="discrete", options=dict(max_step=0.1))
model = nn.Sequential(nn.Linear(3, 2), layer)
"""

MISTAKES = {
    "solve(field, y0, t, rtool=1e-5)": "rtool",
    'solve(field, y0, t, method="dopri6")': "dopri6",
    'solve(field, y0, t, gradient="adjont")': "adjont",
    "odeint(field, y0, t, clip=True)": "No overloads",
    'odeint(field, y0, t, method="dopri6")': "dopri6",
    "odeint_adjoint(field, y0, t, checkpoint=3)": "No overloads",
    "odeint_event(field, y0, t[0])": "event_fn",
    'odeint_dense(field, y0, 0.0, "1.0")': "1.0",
    "NeuralODE(field, clip=True)": "clip",
    'NeuralODE(field, gradient="adjont")': "adjont",
    "solve(field, y0, t).yss": "yss",
    "solve(pair, (y0, y0), t).ys.mean()": "mean",
}


@pytest.mark.slow
def test_pyright_accepts_a_typical_program_and_finds_each_mistake_in_it(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM + "\n".join(MISTAKES))
    (tmp_path / "pyrightconfig.json").write_text(
        json.dumps({"include": ["program.py"], "extraPaths": [str(ROOT)], "reportPrivateImportUsage": False})
    )
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--outputjson", "-p", str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    found: dict[int, str] = {}
    for message in json.loads(ran.stdout)["generalDiagnostics"]:
        line = message["range"]["start"]["line"]
        found[line] = found.get(line, "") + message["message"]
    assert_only_the_mistakes(found)


@pytest.mark.slow
def test_mypy_accepts_a_typical_program_and_finds_each_mistake_in_it(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM + "\n".join(MISTAKES))
    cache = ROOT / "build" / "tests" / "mypy"  # what mypy knows of torch is kept
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(cache), str(program)]
    ran = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "MYPYPATH": str(ROOT)}
    )
    found: dict[int, str] = {}
    for line, words in re.findall(r"program\.py:(\d+): error: (.*)", ran.stdout):
        found[int(line) - 1] = found.get(int(line) - 1, "") + words
    assert_only_the_mistakes(found, words=False)


def assert_only_the_mistakes(found: dict[int, str], *, words: bool = True) -> None:
    """found: messages by line. words: each message names what is wrong."""
    first = len(PROGRAM.splitlines())
    assert not {line: said for line, said in found.items() if line < first}, "the program itself"
    for line, (mistake, word) in enumerate(MISTAKES.items(), start=first):
        assert line in found and (word in found[line] or not words), f"{mistake}: {found.get(line)}"
