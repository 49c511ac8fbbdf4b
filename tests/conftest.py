"""Every test starts from the same seed, in float32, on one thread; those marked `gpu` are skipped without one."""

import shutil

import pytest
import torch
from shim import library
from shim.eager import Eager

from node_cuda.field import VectorField
from node_cuda.kernels import backend as dispatch
from node_cuda.kernels import capture, self_check

self_check.trust(torch.device("cpu"))  # where the shim runs the kernels: tests/test_self_check.py checks them there
torch.set_num_threads(1)  # the suite runs with -n 2 on two cores: more threads only fight each other


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device on this machine")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def same_start():
    """A test that leaves another default dtype or gradient mode behind fails by itself, not its neighbour."""
    torch.manual_seed(0)
    yield
    assert torch.get_default_dtype() == torch.float32, "a test left another default dtype behind"
    assert torch.is_grad_enabled(), "a test left gradients switched off"


@pytest.fixture
def torchdiffeq():
    """The reference version, where it is installed."""
    return pytest.importorskip("torchdiffeq")


@pytest.fixture(scope="session")
def shim_library():
    """csrc/ behind the shim, compiled once for all test processes."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile the kernels with")
    return library.built("shim", library.behind_shim)


@pytest.fixture(scope="session")
def shim_module(shim_library):
    return library.import_module(shim_library)


@pytest.fixture(scope="session")
def shim_controls(shim_library):
    """The same library, as the tests drive the shim by it."""
    return library.Controls(shim_library)


@pytest.fixture
def shim(shim_module, shim_controls, monkeypatch):
    """The kernels run on the CPU."""
    monkeypatch.setattr(dispatch, "_has_kernels", lambda device: device.type == "cpu")
    monkeypatch.setattr(dispatch, "_kernels", lambda device: (shim_module, (0, 0)))
    yield shim_controls
    shim_controls.lib.shim_fail_next_launch(0)
    shim_controls.configure()


@pytest.fixture
def eager(shim, monkeypatch):
    """The device's loop runs on the CPU: what would be captured is done anew for every step."""
    monkeypatch.setattr(capture, "Recorder", Eager)
    monkeypatch.setattr(VectorField, "release", lambda self: None)
