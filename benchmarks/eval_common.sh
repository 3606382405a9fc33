# Sourced by the scripts that measure recall and perplexity: names, texts, and how much to ask.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
lola() { .venv/bin/lola-vllm "$@"; }
texts() { .venv/bin/python -m tools.texts "$@"; }
SAMPLES=${SAMPLES:-50}
SEED=${SEED:-1} # 0 is for choosing
OUT=${OUT:-eval-results}

[ -d models/texts ] || texts --out models/texts
