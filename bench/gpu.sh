#!/usr/bin/env bash
# Everything that needs a GPU, in one go and under 9 minutes, on a CUDA machine that has its own Python with torch,
# Triton, nvcc, compute-sanitizer and pytest, and needs no network: builds the extension in place, runs the GPU tests,
# the memory checker and the first benchmark.
#
#   PYTHON=python3 OUT=bench/results bash bench/gpu.sh
#
# Logs, CSV and table go to OUT: seven files; a relative name is taken from the repository. A failed stage does not
# stop the later ones; the exit code is 0 only if every stage that was required passed. The last lines, and
# OUT/summary.txt, say which did.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-bench/results}
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) || { echo "gpu.sh: OUT=$OUT cannot be made a folder" >&2; exit 2; }
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
readonly DEADLINE=515 # seconds for everything; a stage that overruns is interrupted, and killed 10 s later
failed=0
rm -f "$OUT"/{setup,tests,sanitizer,bench}.log
: >"$OUT/summary.txt"

record() { # stage, seconds, result
    printf '%-22s %5s s  %s\n' "$@" | tee -a "$OUT/summary.txt"
}

finish() {
    echo "total $SECONDS s; exit code $failed; logs in $OUT" | tee -a "$OUT/summary.txt"
    printf '\n== summary\n'
    cat "$OUT/summary.txt"
    exit "$failed"
}

refuse() { # message: nothing can run here
    failed=1
    echo "gpu.sh: $1" | tee -a "$OUT/summary.txt" >&2
    finish
}

# stage NAME LIMIT LOG COMMAND...: runs COMMAND for at most LIMIT seconds; OPTIONAL=1: no time left is no failure.
stage() {
    local name=$1 limit=$2 log=$OUT/$3 began=$SECONDS left=$((DEADLINE - SECONDS)) code result=passed
    shift 3
    if ((left < 10)); then
        record "$name" 0 "NOT RUN: no time left"
        ((${OPTIONAL:-0})) || failed=1
        return
    fi
    printf '\n== %s\n' "$name" | tee -a "$log"
    timeout -s INT -k 10 $((limit < left ? limit : left)) "$@" >>"$log" 2>&1
    code=$?
    case $code in
    0) ;;
    124 | 137) result="TIMED OUT" ;;
    *) result="FAILED (exit code $code)" ;;
    esac
    tail -n "$((code ? 25 : 6))" "$log"
    ((code)) && failed=1
    record "$name" $((SECONDS - began)) "$result"
}

missing() { # stage, what
    failed=1
    record "$1" 0 "FAILED: $2 is missing"
}

command -v "$PYTHON" >/dev/null || refuse "PYTHON=$PYTHON is not a command; name an interpreter that has torch"
torch=$("$PYTHON" -c 'import torch; print(torch.__version__)' 2>&1) || refuse "$PYTHON cannot import torch: ${torch##*$'\n'}"
arch=$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())' 2>/dev/null) ||
    refuse "torch $torch, imported by $PYTHON, sees no CUDA device; this script is for a machine that has one"
cuda_home=$("$PYTHON" -c 'from torch.utils.cpp_extension import CUDA_HOME; print(CUDA_HOME or "")' 2>/dev/null)
PATH=$PATH${cuda_home:+:$cuda_home/bin}
export TORCH_CUDA_ARCH_LIST=$arch

{
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
    nvcc --version
    compute-sanitizer --version
    "$PYTHON" --version
    "$PYTHON" -m pip list 2>/dev/null | grep -iE '^(torch|triton|numpy|pytest|ninja|pybind11|transformers) '
} >"$OUT/setup.log" 2>&1

if command -v nvcc >/dev/null; then
    SSVD_BUILD=cuda stage "build for sm_$arch" 120 setup.log "$PYTHON" setup.py build_ext --inplace
else
    missing "build for sm_$arch" nvcc
fi
stage info 30 setup.log "$PYTHON" -m ssvd_kernels info
pytest=(env OMP_NUM_THREADS=2 "$PYTHON" -m pytest) # with several processes, most of the time is compilation
"$PYTHON" -c 'import xdist' 2>/dev/null && pytest+=(-n 8)
stage "GPU tests" 140 tests.log "${pytest[@]}" -rfEs -m "gpu and not slow" tests

# Without torch's caching allocator every tensor has its own allocation, so that a step outside it is seen.
sanitize() { # tool, limit
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 stage "compute-sanitizer $1" "$2" sanitizer.log \
        compute-sanitizer --tool "$1" --error-exitcode 9 --print-limit 20 "$PYTHON" tests/test_gpu.py
}
if command -v compute-sanitizer >/dev/null; then sanitize memcheck 75; else missing compute-sanitizer compute-sanitizer; fi

stage benchmark 150 bench.log "$PYTHON" -m bench.run --device cuda --limit-seconds 100 --out "$OUT/gpu.csv"
stage "op and kernel tests" 120 tests.log "${pytest[@]}" -rfE -m "not gpu and not slow and not data" \
    tests/test_triton.py tests/test_ext.py tests/test_cayley.py tests/test_linear.py
if command -v compute-sanitizer >/dev/null; then
    OPTIONAL=1 sanitize racecheck 60
    OPTIONAL=1 sanitize initcheck 60
fi
finish
