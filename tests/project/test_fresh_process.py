"""The modules that an import and a first call load, in a new process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FIRST, OTHER = 5.0, 1.0
"""Seconds of processor time of a first call, the compiler's import included, and of one at another batch size. Measured
with two cores for five people: 1.5 to 2.2, and 0.15 to 0.29; before, with everything traced: 12 to 27, and 10 to 24."""

FRESH = """
import sys, time, torch
before = set(sys.modules)
import node_cuda
print(*set(sys.modules) - before)
from node_cuda.cuda_graphs.capture import Watch
with Watch(torch.device("cpu")):
    torch.ones(3).sin()
print(*set(sys.modules) - before)
import test_compiled
model, seconds = torch.compile(test_compiled.Around("odeint"), backend="eager"), []
for size in (4, 5):
    start = time.process_time()
    model(torch.ones(size, 2))
    print(time.process_time() - start)
"""


@pytest.mark.slow
def test_import_and_the_check_before_a_capture_load_no_compiler_and_a_first_compiled_call_is_quick():
    """scipy.integrate and torch._dynamo would take most of the import."""
    environment = dict(os.environ, PYTHONPATH=f"{ROOT}:{ROOT / 'tests' / 'unit'}", OMP_NUM_THREADS="1")
    run = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True, env=environment, check=True)
    imported, watched, first, other = run.stdout.splitlines()
    for loaded in (imported, watched):
        assert not [name for name in loaded.split() if name.startswith(("scipy", "torch._dynamo", "torch._inductor"))]
    assert float(first) < FIRST and float(other) < OTHER
