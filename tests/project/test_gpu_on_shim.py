"""Tests of the tests: some tests that need a GPU pass on the CPU, by the shim. `make pretend-gpu` runs them all.

If a test fails there, the test itself is wrong, and it would waste the first minutes on a GPU.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from shim.pretend_gpu import LEFT_OUT

TESTS = Path(__file__).resolve().parents[1]

# At least one of each kind; together they take ten seconds.
SOME = """
gpu/test_gpu.py::test_a_solve_without_gradients_agrees_with_the_cpu
gpu/test_gpu.py::test_adjoint_gradients_for_state_times_and_parameters_agree_with_the_cpu
gpu/test_gpu.py::test_solves_run_on_the_current_stream_and_give_the_bits_of_the_default_stream
gpu/test_gpu.py::test_the_mode_finds_a_synchronisation
gpu/test_gpu.py::test_a_step_of_the_backward_pass_synchronises_only_to_read_the_step_control[None]
gpu/test_gpu.py::test_a_step_on_a_fixed_grid_never_synchronises
gpu/test_gpu_graphs.py::test_every_explicit_method_has_the_bits_of_the_host_loop[dopri5-while]
gpu/test_gpu_graphs.py::test_every_explicit_method_has_the_bits_of_the_host_loop[rk4-batches]
gpu/test_gpu_graphs.py::test_a_failed_deferred_solve_returns_nan_and_check_raises[MAX_STEPS-while]
gpu/test_gpu_graphs.py::test_a_field_that_draws_random_numbers_runs_on_the_host
gpu/test_gpu_graphs.py::test_dropout_runs_on_the_host_in_training_and_is_captured_in_evaluation
gpu/test_gpu_graphs.py::test_gradients_agree_with_the_host_loop[of t-adjoint-while]
gpu/test_gpu_graphs.py::test_gradients_agree_with_the_host_loop[of t-discrete-while]
gpu/test_gpu_graphs.py::test_gradients_agree_with_the_host_loop[not of t-discrete, rk4-batches]
gpu/test_gpu_graphs.py::test_gradients_of_a_tuple_and_of_many_outputs_agree_with_the_host_loop[discrete-while]
unit/test_odeint.py::test_a_gpu_gives_the_cpus_solution[mlp]
compat/test_differences.py::test_times_on_another_device_give_no_warning
unit/loop/test_dense.py::test_dense_output_stays_on_its_device
""".strip().splitlines()


@pytest.mark.slow
def test_tests_that_need_a_gpu_pass_on_the_cpu(shim_library):
    run = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-m",
        "gpu",
        "--pretend-gpu",
    ]
    done = subprocess.run(
        [*run, *(str(TESTS / name) for name in SOME)], cwd=TESTS.parent, capture_output=True, text=True, timeout=200
    )
    last = done.stdout.strip().splitlines()[-1]
    assert done.returncode == 0 and re.match(r"\d+ passed in ", last), done.stdout + done.stderr


def test_every_excluded_test_exists():
    """A renamed test would run and fail. A deleted test would stay in the list."""
    with_marks = [text for path in TESTS.rglob("test_*.py") if "mark.gpu" in (text := path.read_text())]
    names = [name for of_a_reason in LEFT_OUT.values() for name in of_a_reason]
    assert [name for name in names if not any(f"def {name}(" in text for text in with_marks)] == []
