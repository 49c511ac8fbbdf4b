#!/usr/bin/env bash
# Runs the checks, tests and benchmarks that need a GPU, in three stages. It compiles and downloads nothing.
#
#   1. On the machine where the project is developed, which needs no GPU:
#        python bench/build_for_gpu.py                      # compiles, and prints what to copy and what to type
#   2. On the machine with the GPU, in the checkout, with build/gpu-*/carry in it:
#        bench/gpu.sh smoke prove --out FOLDER              # are the results correct? at most 300 s
#        bench/gpu.sh measure --out FOLDER                  # how fast is it? at most 230 s, the most important first
#      FOLDER then has gpu.json (machine, commit, a line for each check, the rows of the benchmarks) and gpu.tgz (logs).
#   3. Back on the first machine:
#        python bench/gpu_unpack.py --publish FOLDER        # writes bench/results/ and fills the tables of the pages
#
# smoke: `python -m node_cuda`, solves and gradients by the kernels and captured (bench/smoke.py), the kernel tests.
# prove: the bandwidth of the kernels, then the tests marked gpu. It starts only if no line of smoke in this call failed.
# measure: steps, training and solves with the loop on the GPU, whole solves, memory, compute-sanitizer, CUDA calls.
# --diffrax: measure diffrax too, which takes long to compile.
# --deadline SECONDS: the time limit of the whole call.
# Every item is a process with a time limit. If it fails, crashes or hangs, its line says why, and the next item runs.
# All lines are printed again at the end.
#
# PYTHON: the interpreter that has a CUDA build of torch. NODE_CUDA_COMMIT: the commit, if there is no repository.
# If smoke fails, read the logs in gpu.tgz.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; fi
fi
if ! command -v "$PYTHON" >/dev/null; then
  echo "There is no $PYTHON here. For another interpreter: PYTHON=... bench/gpu.sh." >&2
  exit 1
fi
exec "$PYTHON" -u bench/gpu_stages.py "$@"
