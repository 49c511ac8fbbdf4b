"""install_as_torchdiffeq and `python -m node_cuda run`, in processes of their own, with torchcde."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from node_cuda.as_torchdiffeq.install import PARTS

ROOT = Path(__file__).resolve().parents[2]


def python(*arguments: str, cwd: Path = ROOT) -> str:
    """Run Python, and return what it printed."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=cwd, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


IN_ONE_PROCESS = """
import sys, node_cuda, torch
before = list(sys.meta_path)
with node_cuda.install_as_torchdiffeq() as handle:
    import torchdiffeq
    import torchdiffeq._impl.odeint
    from torchdiffeq import odeint, odeint_adjoint, odeint_dense, odeint_event
    from torchdiffeq._impl.odeint import SOLVERS
    from torchdiffeq._impl.misc import Perturb, _flat_to_shape
    from torchdiffeq._impl.adjoint import find_parameters
    assert odeint is node_cuda.odeint and torchdiffeq._impl.odeint is odeint, "as there, the function"
    assert torchdiffeq.__version__ == f"0.2.5+node_cuda.{node_cuda.__version__}"
    assert node_cuda.install_as_torchdiffeq() is handle
    for line, kind, words in (
        ("torchdiffeq.other", AttributeError, "which has no 'other'. It has _impl, odeint, odeint_adjoint"),
        ("torchdiffeq._impl.misc.other", AttributeError, "It has Perturb, _check_inputs"),
        ("from torchdiffeq._impl.misc import other", ImportError, "install.py"),
        ("import torchdiffeq._impl.dopri8", ModuleNotFoundError, "It has torchdiffeq._impl.odeint"),
    ):
        try:
            exec(line)
        except kind as error:
            assert words in str(error), error
        else:
            raise AssertionError(line)
assert not handle.installed and not any(name.startswith("torchdiffeq") for name in sys.modules)
assert sys.meta_path == before
import torchdiffeq
assert torchdiffeq.__version__ == "0.2.5"
try:
    node_cuda.install_as_torchdiffeq()
except node_cuda.Unsupported as error:
    assert "torchdiffeq was imported before, by __main__" in str(error), error
    assert "python -m node_cuda run PROGRAM.py" in str(error)
    print("good")
"""


@pytest.mark.slow
def test_torchdiffeq_is_this_package_between_install_and_uninstall() -> None:
    assert python("-c", IN_ONE_PROCESS).split() == ["good"]


def test_the_page_names_everything_that_there_is() -> None:
    page = (ROOT / "docs" / "as_torchdiffeq.md").read_text()
    for part, known in PARTS.items():
        for name in (part, *known):
            assert f"`{name}`" in page, f"torchdiffeq._impl.{part}: {name}"


PROGRAM = """
import multiprocessing, subprocess, sys
import torch, torchcde, torchdiffeq

def version(_):
    return torchdiffeq.__version__

class Field(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(3, 6)
    def forward(self, t, z):
        return torch.tanh(self.linear(z)).view(*z.shape, 2)

if __name__ == "__main__":
    torch.manual_seed(0)
    x = torch.rand(2, 5, 2)
    X = torchcde.CubicSpline(torchcde.hermite_cubic_coefficients_with_backward_differences(x))
    func = Field()
    z = torchcde.cdeint(X, func, torch.ones(2, 3), X.interval, adjoint=True, rtol=1e-5, atol=1e-5)
    z.square().sum().backward()
    print(sys.argv[1:], torchdiffeq.__version__)
    print(z[:, -1].flatten().tolist() + func.linear.weight.grad.flatten().tolist())
    if torchdiffeq.__version__ == "0.2.5":
        sys.exit()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(*pool.map(version, [0]))
    line = "import torchdiffeq; print(torchdiffeq.__version__)"
    print(subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, cwd="/").stdout.strip())
"""


@pytest.mark.slow
def test_a_program_with_torchcde_runs_unchanged_on_this_package_with_its_workers(tmp_path: Path) -> None:
    """rtol is 1e-5, and the numbers are of order 1, so that both solvers agree to 1e-3."""
    (tmp_path / "train.py").write_text(PROGRAM)
    theirs = python("train.py", "--lr", "1", cwd=tmp_path).splitlines()
    ours = python("-m", "node_cuda", "run", "train.py", "--lr", "1", cwd=tmp_path).splitlines()
    assert theirs[0] == "['--lr', '1'] 0.2.5" and ours[0].startswith("['--lr', '1'] 0.2.5+node_cuda.")
    found, truth = (eval(lines[1]) for lines in (ours, theirs))
    assert found == pytest.approx(truth, abs=1e-3)
    assert ours[2].startswith("0.2.5+node_cuda."), "a worker that multiprocessing spawned"
    assert ours[3].startswith("0.2.5+node_cuda."), "a Python that subprocess started"


def test_another_sitecustomize_still_runs(tmp_path: Path) -> None:
    """Python runs only the first sitecustomize that it finds, so ours runs the next one."""
    (tmp_path / "sitecustomize.py").write_text("print('theirs')")
    startup = ROOT / "node_cuda" / "as_torchdiffeq" / "startup"
    env = {**os.environ, "PYTHONPATH": f"{startup}{os.pathsep}{tmp_path}", "NODE_CUDA_AS_TORCHDIFFEQ": str(ROOT)}
    line = "import sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.stdout.split() == ["theirs", "False"], done.stderr
