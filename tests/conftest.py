"""Every test starts from the same seed, in float32, on one thread. Tests marked `gpu` are skipped without a GPU.

`pytest -m gpu --pretend-gpu` runs them on the CPU (support/shim/pretend_gpu.py).
"""

import shutil
from pathlib import Path

import pytest
import torch
from shim import library, pretend_gpu
from shim.eager import Eager

from node_cuda.cuda_graphs import capture, first_run_check
from node_cuda.gradients.adjoint import many_outputs
from node_cuda.kernels import backend as dispatch
from node_cuda.kernels import self_check
from node_cuda.native import build as native_build
from node_cuda.problem.field import VectorField

KERNELS = Path(__file__).parent / "kernels"
LONG = ("compiled", "builds")  # markers of tests that `make test` leaves out

# on the CPU, where the shim runs the kernels; kernels/test_self_check.py checks them there
self_check.trust(torch.device("cpu"))
# told once a process, which is not to be by whichever test comes first
many_outputs._untold.acquire()
torch.set_num_threads(1)  # the suite runs with -n 2 on two cores, so more threads would only slow it down


def pytest_addoption(parser):
    parser.addoption("--pretend-gpu", action="store_true", help="run tests marked gpu on the CPU, by the shim")
    for marker in LONG:
        parser.addoption(f"--{marker}", action="store_true", help=f"run the tests marked {marker}, too")


def pytest_configure(config):
    if config.getoption("pretend_gpu"):
        pretend_gpu.pretend()


def pytest_collection_modifyitems(config, items):
    left_out = [marker for marker in LONG if not config.getoption(marker)]
    long = {item for item in items if any(item.get_closest_marker(marker) for marker in left_out)}
    config.hook.pytest_deselected(items=list(long))
    items[:] = [item for item in items if item not in long]
    items.sort(
        key=lambda item: item.get_closest_marker("slow") is None
    )  # first, so that no process is alone at the end
    for item in items:
        if KERNELS in item.path.parents or "shim_library" in item.fixturenames:
            item.add_marker("compiler")
    skip_without_gpu(items)


def skip_without_gpu(items):
    left_out = {name: why for why, names in pretend_gpu.LEFT_OUT.items() for name in names}
    for item in items:
        if not item.get_closest_marker("gpu"):
            continue
        if pretend_gpu.pretending():
            why = left_out.get(item.originalname)
        else:
            why = None if torch.cuda.is_available() else "no CUDA device on this machine"
        if why is not None:
            item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(autouse=True)
def pretended_gpu(request, monkeypatch):
    """With --pretend-gpu replace the GPU by the shim and the CPU, in tests that need a GPU."""
    if pretend_gpu.pretending() and request.node.get_closest_marker("gpu"):
        pretend_gpu.stand_in(request.getfixturevalue("shim_module"), monkeypatch)


@pytest.fixture(autouse=True)
def same_start():
    """Fail a test that leaves another default dtype or gradient mode, so that the next test does not fail instead."""
    torch.manual_seed(0)
    yield
    assert torch.get_default_dtype() == torch.float32, "a test did not restore the default dtype"
    assert torch.is_grad_enabled(), "a test did not switch gradients on again"


@pytest.fixture
def torchdiffeq():
    """The installed reference version of torchdiffeq; skips without it."""
    return pytest.importorskip("torchdiffeq")


@pytest.fixture(scope="session")
def shim_library():
    """csrc/ compiled with the shim, once for all test processes."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile the kernels with")
    return library.built("shim", library.behind_shim)


@pytest.fixture(scope="session")
def shim_module(shim_library):
    return library.import_module(shim_library)


@pytest.fixture(scope="session")
def shim_controls(shim_library):
    """The same library, with the functions that control the shim."""
    return library.Controls(shim_library)


@pytest.fixture
def shim(shim_module, shim_controls, monkeypatch):
    """Run the kernels on the CPU."""
    monkeypatch.setattr(dispatch, "_has_kernels", lambda device: device.type == "cpu")
    monkeypatch.setattr(dispatch, "_kernels", lambda device: (shim_module, (0, 0)))
    yield shim_controls
    shim_controls.lib.shim_fail_next_launch(0)
    shim_controls.configure()


@pytest.fixture
def compiled_solves():
    """Skip the test if this torch is too old to compile solves, for the reason that a solve gives, too.

    unit/native/test_build.py tests that reason.
    """
    if (why := native_build.why_not()) is not None:
        pytest.skip(why)


@pytest.fixture
def interpreted(compiled_solves, monkeypatch):
    """Run compiled solves as traced graphs, without the compiler. Results are the same up to rounding."""
    monkeypatch.setattr(native_build, "interpreted", True)


class Everything:
    """A container that has every key."""

    def __contains__(self, _):
        return True


@pytest.fixture
def eager(shim, monkeypatch):
    """Run the loop of the device on the CPU: the Python of a captured step runs again for every step.

    The first solves are not compared with the host's, because the tests do that.
    """
    monkeypatch.setattr(capture, "GraphCapture", Eager)
    monkeypatch.setattr(first_run_check, "_confirmed", Everything())
    monkeypatch.setattr(VectorField, "release", lambda self: None)
