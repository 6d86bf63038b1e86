#!/usr/bin/env bash
# What needs a GPU, in parts of under 9 minutes each, on a CUDA machine that has its own Python with torch, Triton, nvcc,
# compute-sanitizer and pytest, and needs no network. Every part builds the extension in place first.
#
#   PART=check     GPU tests, memcheck, op and kernel tests, every benchmark case at a tiny size (the default)
#   PART=sanitize  compute-sanitizer: memcheck, racecheck, initcheck
#   PART=bench     benchmark of the op, the layer and the Cayley map
#   PART=model     benchmark of many adapters in a batch, of models, accumulation, their extras, decoding and injection
#   PART=asr       the next part of the speech experiment's full grid: learning rates first, then its cells. Needs data/
#                  and transformers; what is done is kept in runs/asr-cells, and with the tables in OUT/asr-cells.tar.gz:
#                  put that into runs/ and the next call goes on, on another machine, too
#
#   PART=check PYTHON=python3 OUT=bench/results bash bench/gpu.sh
#
# Logs, CSV and table go to OUT: at most seven files; a relative name is taken from the repository. A failed stage does
# not stop the later ones; the exit code is 0 only if every stage passed. The last lines, and OUT/summary.txt, say which
# did. `python -m bench.plot` draws the figures from the CSV, `python -m bench.goals` prints what it says of the goals.
set -uo pipefail
cd "$(dirname "$0")/.."
PART=${PART:-check}
case $PART in check | sanitize | bench | model | asr) ;; *)
    echo "gpu.sh: PART must be one of check, sanitize, bench, model, asr, got $PART" >&2
    exit 2
    ;;
esac
PYTHON=${PYTHON:-python3}
OUT=${OUT:-bench/results}
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) || { echo "gpu.sh: OUT must be a folder that can be created, got $OUT" >&2; exit 2; }
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD:$PWD/tests/support${PYTHONPATH:+:$PYTHONPATH}"
readonly DEADLINE=515 # seconds for everything; a stage that overruns is interrupted, and killed 10 s later
failed=0
rm -f "$OUT"/{setup,tests,sanitizer,bench,asr}.log "$OUT/quick.csv"
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

# stage NAME LIMIT LOG COMMAND...: runs COMMAND for at most LIMIT seconds.
stage() {
    local name=$1 limit=$2 log=$OUT/$3 began=$SECONDS left=$((DEADLINE - SECONDS)) code result=passed
    shift 3
    if ((left < 10)); then
        record "$name" 0 "NOT RUN: no time left"
        failed=1
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

# Without torch's caching allocator every tensor has its own allocation, so that a step outside it is seen.
sanitize() { # tool, limit
    if ! command -v compute-sanitizer >/dev/null; then
        missing "compute-sanitizer $1" compute-sanitizer
        return
    fi
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 stage "compute-sanitizer $1" "$2" sanitizer.log \
        compute-sanitizer --tool "$1" --error-exitcode 9 --print-limit 20 "$PYTHON" tests/gpu/test_gpu.py
}

measure() { # operations
    stage benchmark 430 bench.log "$PYTHON" -m bench.run --device cuda --limit-seconds 340 --no-figures \
        --only "$1" --out "$OUT/gpu-$PART.csv"
    stage goals 20 bench.log "$PYTHON" -m bench.goals "$OUT/gpu-$PART.csv"
}

experiment() { # name, options: the same command goes on where the last one stopped (exit code 75)
    local name=$1 minutes=$(((DEADLINE - SECONDS) / 60 - 2)) # what it has begun then takes up to a minute and a half
    shift
    if ((minutes < 1)); then
        record "$name" 0 "NOT BEGUN: for the next call"
        return
    fi
    stage "$name" $((DEADLINE - SECONDS - 40)) asr.log sh -c '"$@" || { [ $? -eq 75 ] && echo "unfinished: for the next call"; }' sh "$PYTHON" \
        -m experiments.asr.experiment --grid full --device cuda --workers 4 --tuned runs/asr-tuned.csv --out runs/asr-full \
        --minutes $minutes "$@"
}

case $PART in
check)
    stage "GPU tests" 160 tests.log "${pytest[@]}" -rfEs -m "gpu and not slow" tests
    sanitize memcheck 75
    stage "op and kernel tests" 120 tests.log "${pytest[@]}" -rfE -m "not gpu and not slow and not data" \
        tests/ops/kernels/test_triton_ssvd_linear.py tests/ops/kernels/test_triton_ssvd_activation.py tests/ops/kernels/test_triton_cayley.py tests/ops/kernels/test_custom_ops.py tests/ops/test_extension.py tests/ops/test_cayley.py tests/ops/test_ssvd_linear.py
    stage benchmark 90 bench.log "$PYTHON" -m bench.run --device cuda --quick --no-figures --out "$OUT/quick.csv"
    ;;
sanitize)
    sanitize memcheck 120
    sanitize racecheck 150
    sanitize initcheck 120
    ;;
bench) measure cayley,layer,linear ;;
model)
    stage "many adapters" 80 bench.log "$PYTHON" -m bench.many --device cuda --counts 24 --seconds 1 --out "$OUT/gpu-many.csv"
    measure accumulate,model,extras,decode,inject
    ;;
asr)
    mkdir -p runs/asr-cells
    kept=runs/asr-cells.tar.gz # of an earlier call, on this machine or another one; unpacked once
    [ ! -f $kept ] || { tar -xzf $kept --skip-old-files && rm $kept; } || refuse "$kept cannot be unpacked"
    [ -f runs/asr-tuned.csv ] || experiment "learning rates" --tune
    [ ! -f runs/asr-tuned.csv ] || experiment "full grid"
    stage "keep the cells" 60 asr.log sh -c 'tar -czf "$1.part" --exclude checkpoint.pt runs/asr-cells \
        $(ls -d runs/asr-full runs/asr-tuned.csv 2>/dev/null) && mv "$1.part" "$1"' sh "$OUT/asr-cells.tar.gz"
    ;;
esac
finish
