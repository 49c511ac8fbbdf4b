#!/usr/bin/env bash
# All that only a GPU can show, in three stages. Nothing is compiled or downloaded where this runs.
#
#   1. Where the project is developed (no GPU is needed there):
#        python bench/build_for_gpu.py                      # compiles, and says what to carry and what to type
#   2. On the machine with the GPU, in the checkout with build/gpu-*/carry in it:
#        bench/gpu.sh smoke prove --out FOLDER              # is all of it right? at most 300 s
#        bench/gpu.sh measure --out FOLDER                  # how fast? at most 230 s, what matters most first
#      FOLDER then holds gpu.json (machine, commit, a line a check, the benchmarks' rows) and gpu.tgz (their logs).
#   3. Where the project is developed:
#        python bench/gpu_unpack.py --publish FOLDER        # into bench/results/, and the tables of the pages
#
# smoke: `python -m node_cuda`, solves and gradients by the kernels and captured (bench/smoke.py), the kernel tests.
# prove: the kernels' bandwidth, then the tests marked gpu; it starts only if no line of smoke in the same call failed.
# measure: steps, training and solves by the loop on the device, whole solves, memory, compute-sanitizer, calls; with
# --diffrax also diffrax, whose compiler takes its time. --deadline SECONDS: of the whole call. Every item has a process
# and a limit; what fails, crashes or hangs does not stop the others, and its line says why. All lines come again last.
#
# PYTHON: the interpreter that has a CUDA build of torch. NODE_CUDA_COMMIT: the commit, where there is no repository.
# What to do next if smoke fails: read gpu.tgz.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; fi
fi
if ! command -v "$PYTHON" >/dev/null; then
  echo "There is no $PYTHON here: PYTHON=... bench/gpu.sh names another interpreter." >&2
  exit 1
fi
exec "$PYTHON" -u bench/gpu_stages.py "$@"
