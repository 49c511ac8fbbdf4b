"""options=dict(progress=True): a bar for each pass where the host takes the steps, and a sentence where it does not."""

from __future__ import annotations

import re
import sys

import pytest
import torch
from problems import F64, MLP, linspace

from node_cuda import InvalidInput, odeint_event, solve
from node_cuda.loop import progress

Y = torch.tensor([[0.7, -0.4], [0.1, 0.2]], dtype=F64)
T = linspace(0.0, 2.0, 9)
SHOWN = dict(progress=True)


def bars(capsys) -> dict[str, list[str]]:
    """Return what was written for each pass, with every state of its bar."""
    states = re.split(r"[\r\n]+", capsys.readouterr().err)
    return {name: [s for s in states if s.startswith(f"{name}:")] for name in ("forwards", "backwards")}


def of(text: str) -> dict[str, str]:
    """Return the numbers that a state of a bar shows."""
    return dict(re.findall(r"(\w+) = ([^,\]]+)", text))


@pytest.mark.parametrize(
    ("method", "gradient"),
    [
        ("dopri5", "adjoint"),
        ("dopri5", "discrete"),
        ("rk4", "adjoint"),
        ("rk4", "discrete"),
        ("rodas5p", "adjoint"),
        ("implicit_adams", "adjoint"),
    ],
)
def test_both_passes_show_a_bar_that_ends_with_the_counts_of_the_solve(method, gradient, capsys):
    y0 = Y.clone().requires_grad_()
    solution = solve(MLP(dim=2), y0, T, rtol=1e-4, atol=1e-4, method=method, gradient=gradient, options=SHOWN)
    (*_, last) = bars(capsys)["forwards"]
    assert last.startswith("forwards: 100%|")
    assert of(last)["nfe"] == str(solution.stats.nfe) and of(last)["rejected"] == str(solution.stats.rejected)
    assert float(of(last)["t"]) == 2.0 and float(of(last)["h"]) > 0
    solution.ys.sum().backward()
    found = bars(capsys)
    assert not found["forwards"] and found["backwards"][-1].startswith("backwards: 100%|")
    numbers = of(found["backwards"][-1])
    assert float(numbers["t"]) == 0.0 and float(numbers["h"]) < 0 and int(numbers["nfe"]) > 0


def test_the_numbers_are_the_same_with_and_without_a_bar():
    plain, shown = (
        solve(MLP(dim=2), Y, T, method=method, options=options) for options in (None, SHOWN) for method in ("dopri5",)
    )
    assert torch.equal(plain.ys, shown.ys) and plain.stats == shown.stats


def test_the_share_is_that_of_the_interval_and_grows(monkeypatch, capsys):
    monkeypatch.setattr(progress, "OFTEN", 0.0)
    solve(MLP(dim=2), Y, T, method="euler", options=dict(step_size=0.5, **SHOWN))
    shares = [re.search(r"(\d+)%", state).group(1) for state in bars(capsys)["forwards"]]
    assert list(dict.fromkeys(shares)) == ["0", "25", "50", "75", "100"]


def test_the_times_are_the_users_when_time_runs_backwards(capsys):
    solve(MLP(dim=2), Y, linspace(2.0, 1.0, 3), method="rk4", options=SHOWN)
    (*_, last) = bars(capsys)["forwards"]
    assert last.startswith("forwards: 100%|") and of(last)["t"] == "1" and of(last)["h"] == "-0.5"


def test_a_search_for_an_event_shows_the_time_alone(capsys):
    t0 = torch.zeros((), dtype=F64)
    event_t, _ = odeint_event(lambda t, y: -y, Y[0].abs(), t0, event_fn=lambda t, y: y[0] - 0.2, options=SHOWN)
    (*_, last) = bars(capsys)["forwards"]
    assert "%" not in last and float(of(last)["t"]) >= float(event_t)


def test_a_solve_that_fails_leaves_the_bar_where_it_ended(capsys):
    solve(lambda t, y: y * y, Y.abs() + 1, linspace(0.0, 9.0, 2), options=dict(throw=False, max_num_steps=50, **SHOWN))
    (*_, last) = bars(capsys)["forwards"]
    assert 0 < float(of(last)["t"]) < 1 and "forwards:   " in last


def test_solves_whose_steps_the_host_does_not_take_are_refused():
    for more, words in (
        (dict(options=dict(cuda_graph=True, **SHOWN)), r"a captured solve \(cuda_graph=True\).*Drop progress=True"),
        (dict(method="scipy_solver", options=SHOWN), "scipy_solver, whose steps scipy takes"),
    ):
        with pytest.raises(InvalidInput, match=words):
            solve(MLP(dim=2), Y, T, **more)


def test_a_missing_package_is_named_with_the_line_to_type(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ImportError, match=r'"progress"\] = True needs tqdm.*`pip install "node_cuda\[progress\]"`'):
        solve(MLP(dim=2), Y, T, options=SHOWN)
