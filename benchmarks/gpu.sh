#!/usr/bin/env bash
# Everything that needs a GPU, in one run: tests of the kernels, compute-sanitizer on them, and the
# benchmarks. Results go to eval-results/gpu/.
#
#     benchmarks/gpu.sh            all of it
#     benchmarks/gpu.sh tests      one part: tests, sanitize or bench
#
# PYTHON names the interpreter of an environment with a CUDA build of torch, in which lola-vllm was
# installed with nvcc in reach (pip install --no-build-isolation -e .).
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python}
OUT=${OUT:-eval-results/gpu}
PART=${1:-all}
mkdir -p "$OUT"

die() {
    echo "gpu.sh: $*" >&2
    exit 1
}

case $PART in
    all | tests | sanitize | bench) ;;
    *) die "unknown part '$PART': tests, sanitize, bench or nothing" ;;
esac
"$PYTHON" - <<'PY' || die "no usable GPU or no CUDA kernels, see above"
import sys

import torch

from lola_vllm.core.ops import cpp

if not torch.cuda.is_available():
    sys.exit("torch sees no CUDA device")
if not cpp.load():
    sys.exit("the extension is not built")
if not torch._C._dispatch_has_kernel_for_dispatch_key("lola::decode", "CUDA"):
    sys.exit("the extension was built without its CUDA kernels")
PY
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv | tee "$OUT/machine.csv"

OP_TESTS=tests/ops/conformance
SANITIZED="head_sizes or sizes_and_parts or rows_are or head_layouts or candidates or thousands"

if [[ $PART == all || $PART == tests ]]; then
    for backend in cuda triton; do
        "$PYTHON" -m pytest "$OP_TESTS" --backend $backend -p no:cacheprovider \
            2>&1 | tee "$OUT/${backend}_tests.txt"
    done
    for file in tests/ops/test_{triton_compile,xformers}.py; do
        "$PYTHON" -m pytest "$file" -p no:cacheprovider \
            2>&1 | tee "$OUT/$(basename "$file" .py).txt"
    done
    "$PYTHON" -m pytest tests/engine/test_cuda_graphs.py -p no:cacheprovider \
        2>&1 | tee "$OUT/cuda_graphs.txt"
fi

if [[ $PART == all || $PART == sanitize ]]; then
    command -v compute-sanitizer >/dev/null || die "compute-sanitizer is not in PATH"
    # Without torch's caching allocator each tensor is an allocation whose bounds are checked.
    # Capturing a graph needs that allocator, so the graph test is not among these.
    for tool in memcheck racecheck; do
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 \
            "$PYTHON" -m pytest "$OP_TESTS" --backend cuda -p no:cacheprovider -x -k "$SANITIZED" \
            2>&1 | tee "$OUT/$tool.txt"
    done
fi

if [[ $PART == all || $PART == bench ]]; then
    llama=(--device cuda --heads 32 --kv-heads 8 --state-heads 8 --head-dim 128) # 8B's layer
    for ops in triton cuda; do
        LOLA_VLLM_OPS=$ops "$PYTHON" benchmarks/ops.py "${llama[@]}" --batches 1 8 64 256 \
            --out "$OUT/ops_$ops.json"
    done
    "$PYTHON" benchmarks/engine.py --out "$OUT/engine.json"
    for graphs in piecewise full; do
        LOLA_VLLM_CUDA_GRAPHS=$graphs "$PYTHON" benchmarks/engine.py --compile \
            --out "$OUT/engine_$graphs.json"
    done
    prefill_of=(triton)
    choose='import torch; from lola_vllm.core.ops import choose_backend as c; c("cuda", torch.bfloat16)'
    if LOLA_VLLM_OPS=xformers "$PYTHON" -c "$choose"; then
        prefill_of+=(xformers)
    else
        echo "gpu.sh: xformers cannot serve, see above: Triton's prefill alone is measured" >&2
    fi
    "$PYTHON" benchmarks/ops.py "${llama[@]}" --prefill "${prefill_of[@]}" --batches 1 8 \
        --lams 512 --intervals 64 --out "$OUT/prefill.json"
fi
