#!/usr/bin/env bash
# Everything that only a GPU can show, in under ten minutes on one: builds in place for it, runs the gpu tests, the
# benchmarks, the kernel tests under compute-sanitizer; then installs without kernels and compiles them on first use.
#
#     bench/gpu.sh [STAGE...]          # all stages, or those named
#
# Results go to NODE_CUDA_RESULTS (default: bench/results): the benchmarks' JSON, log/STAGE.txt, and after a run of all
# stages gpu.json with what came of each. A stage that fails does not stop the others; the exit status says if one did.
# PYTHON: the interpreter that has a CUDA build of torch. NODE_CUDA_COMMIT: the commit, where there is no repository.
# Nothing is downloaded: what needs a module that is not installed is left out, and the summary says so.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; fi
fi
if ! found=$("$PYTHON" -c '
import sys
try:
    import torch
except ImportError as error:
    sys.exit(f"{sys.executable} has no torch ({error}): PYTHON=... bench/gpu.sh names another interpreter.")
if not torch.cuda.is_available():
    sys.exit(f"bench/gpu.sh needs an NVIDIA GPU and a CUDA build of torch: torch {torch.__version__} finds no GPU here.")
major, minor = torch.cuda.get_device_capability()
print(sys.executable, f"{major}.{minor}", torch.cuda.get_device_name(), sep="\n")
'); then
  exit 1
fi
{ read -r PYTHON && read -r TORCH_CUDA_ARCH_LIST && read -r gpu; } <<<"$found"
echo "GPU: $gpu ($TORCH_CUDA_ARCH_LIST)"

results=${NODE_CUDA_RESULTS:-bench/results}
mkdir -p "$results/log"
results=$(cd "$results" && pwd)
wanted=$*
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
stages=$work/stages.tsv
: >"$stages"
failed=0
deadline=0 # in seconds since the start. Each stage moves it on, and has what those before it left over.
export PYTHON TORCH_CUDA_ARCH_LIST work
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} # also where the build fails
export PYTHONUNBUFFERED=1 PIP_NO_INPUT=1 PIP_NO_INDEX=1 PIP_DISABLE_PIP_VERSION_CHECK=1

note() { printf '%s\t%s\t%s\t%s\n' "$@" >>"$stages"; }

# Prints those of the modules that are not installed.
lacking() {
  "$PYTHON" -c '
import importlib.util, sys
print(*(name for name in sys.argv[1:] if importlib.util.find_spec(name) is None), sep=", ")
' "$@"
}

# stage NAME SECONDS MODULES COMMAND...: runs the command with a log and a limit, if all of these Python modules are
# installed.
stage() {
  local name=$1 seconds=$2 needs=$3 start=$SECONDS status=0 limit missing modules
  shift 3
  if [ -n "$wanted" ] && [[ " $wanted " != *" $name "* ]]; then return; fi
  read -ra modules <<<"$needs"
  missing=$(lacking "${modules[@]}")
  if [ -n "$missing" ]; then
    note "$name" skipped 0 "not installed: $missing"
    return
  fi
  deadline=$((deadline + seconds))
  limit=$((deadline - SECONDS))
  echo "--- $name, at most $limit s: $*"
  timeout --kill-after=5 "$limit" "$@" >"$results/log/$name.txt" 2>&1 || status=$?
  case $status in
  0) note "$name" passed $((SECONDS - start)) "" ;;
  124 | 137) note "$name" failed $((SECONDS - start)) "stopped after $limit s" ;;
  *) note "$name" failed $((SECONDS - start)) "exit status $status: log/$name.txt" ;;
  esac
  if [ "$status" != 0 ]; then
    failed=1
    tail -n 15 "$results/log/$name.txt"
  fi
}

# An install without kernels, and a solve that compiles them.
# shellcheck disable=SC2329  # invoked by the bash of its stage
first_use() {
  local repository=$PWD
  cd "$work"
  NODE_CUDA_BUILD=python "$PYTHON" -m pip install --no-build-isolation --no-deps --target "$work/pure" "$repository"
  export PYTHONPATH=$work/pure TORCH_EXTENSIONS_DIR=$work/extensions
  "$PYTHON" -c '
import node_cuda, torch
assert "pure" in node_cuda.__file__, f"{node_cuda.__file__} is another install"
t = torch.tensor([0.0, 1.0], device="cuda")
with node_cuda.backend("fused"):
    y = node_cuda.odeint(lambda t, y: -y, torch.ones(1000, device="cuda"), t, rtol=1e-5, atol=1e-5)
torch.testing.assert_close(y[-1], torch.full_like(y[-1], -1.0).exp(), rtol=1e-4, atol=1e-4)
'
  "$PYTHON" -m node_cuda
}
export -f first_use

NODE_CUDA_BUILD=cuda stage build 95 "pip setuptools ninja" \
  "$PYTHON" -m pip install -v --no-build-isolation --no-deps -e .

# The kernels that the tests compile for themselves outlive a run as those of pytest-xdist's workers do: beside the
# folder of a worker. Only files with gpu tests are collected: others may import what is not installed here.
pytest=(env PYTEST_XDIST_WORKER=gpu "$PYTHON" -m pytest -q -p no:cacheprovider --basetemp "$work/tests/run" -m gpu
  -o faulthandler_timeout=20) # a test that hangs leaves its name in the log
mkdir -p "$work/tests"
loops=tests/test_gpu_graphs.py # apart: a loop on the GPU that never ends takes nobody along
mapfile -t with_gpu_tests < <(grep -l 'mark\.gpu' tests/test_*.py | grep -v "$loops")
stage tests 55 "pytest" "${pytest[@]}" "${with_gpu_tests[@]}"
stage batches 25 "pytest" "${pytest[@]}" -vv -k batches "$loops"
stage while 35 "pytest" "${pytest[@]}" -vv -k "not batches" "$loops"

stage kernels 45 "" "$PYTHON" bench/kernels.py --compile-seconds 30 --out "$results"
stage solve 45 "" "$PYTHON" bench/solve.py --device cuda --budget 1.5 --out "$results"
stage device-loop 85 "" "$PYTHON" bench/device_loop.py --budget 2 --jobs 8 --out "$results"
stage memory 50 "rich" "$PYTHON" bench/memory_vs_steps.py --device cuda --steps 8 64 512 --jobs 8 --out "$results"

sanitizer=$(command -v compute-sanitizer || true)
for home in "${CUDA_HOME:-}" "${CUDA_PATH:-}" /usr/local/cuda; do
  if [ -z "$sanitizer" ] && [ -x "$home/bin/compute-sanitizer" ]; then sanitizer=$home/bin/compute-sanitizer; fi
done
# Every kernel in two dtypes, and no whole solves, which would take minutes here.
every_kernel="(float32 or bfloat16 or accumulate or sums or commit or grid or starting or ended) and not solve"
for tool in memcheck racecheck initcheck; do
  if [ -z "$sanitizer" ]; then
    note "$tool" skipped 0 "compute-sanitizer is neither on the PATH nor in CUDA_HOME/bin"
    continue
  fi
  # Without torch's cache every tensor is an allocation of its own, and what lies beside it is out of bounds.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 stage "$tool" 25 "pytest" \
    "$sanitizer" --tool "$tool" --error-exitcode 1 "${pytest[@]}" -k "$every_kernel" tests/test_kernels_shim.py
done

stage first-use 55 "pip setuptools ninja" bash -euo pipefail -c first_use

# Live on what the others leave over, and write each row as they have it.
stage endurance 10 "rich" "$PYTHON" bench/endurance.py --device cuda --solves 400 --out "$results"
stage gradients 5 "" "$PYTHON" bench/gradients.py --device cuda --budget 2 --jobs 8 --out "$results"

if [ -z "$wanted" ]; then "$PYTHON" bench/gpu_record.py "$stages" "$results"; fi
echo
awk -F '\t' '{ printf "%-11s %-8s %4s s  %s\n", $1, $2, $3, $4 }' "$stages"
echo "$SECONDS s on $gpu; results: $results"
exit "$failed"
