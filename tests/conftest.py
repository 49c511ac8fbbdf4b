"""Every test starts from the same seed, in float32, on one thread; those marked `gpu` are skipped without one."""

import os
import shutil

import pytest
import torch
from shim import library

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
def worker_id():
    """As pytest-xdist's, also where it is not installed or not used."""
    return os.environ.get("PYTEST_XDIST_WORKER", "master")


@pytest.fixture(scope="session")
def shim_library(tmp_path_factory, worker_id):
    """csrc/ behind the shim, compiled once for all tests of a session."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile the kernels with")
    return library.once_a_session(tmp_path_factory, worker_id, "shim", library.behind_shim)
