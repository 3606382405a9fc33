#!/usr/bin/env bash
# The curves and tables of docs/endless.md, from nothing: about four hours on two idle CPU cores with
# the defaults, most of them for the 50 questions at each distance (SAMPLES=10 asks fewer).
#
#   make endless                         answers and summaries in eval-results/; again to go on
#   LENGTH=131072 make endless           longer streams (default 32,768 tokens)
#   EVERY=8 make endless                 measure one block of a stream in eight (default: all)
#   DISTANCES=1000,4000,16000,64000      farther needles (default up to 16,000)
#   TOKENS=1000000                       a longer text through vLLM and transformers (default 200,000)
. "$(dirname "$0")/eval_common.sh"

LENGTH=${LENGTH:-32768}
EVERY=${EVERY:-1}
DISTANCES=${DISTANCES:-1000,4000,16000}
TOKENS=${TOKENS:-200000}
STREAM_TEXTS=${STREAM_TEXTS:-models/texts/anarchism_faq.txt}

# What is compared: contexts that shift by 2,048, and positions that run on past the trained 8,192.
lola eval perplexity --stream --stream-length "$LENGTH" --every "$EVERY" --texts "$STREAM_TEXTS" \
    --model models/smollm2-lola --reference models/smollm2-base \
    --sweep benchmarks/recall/endless.json --untrained-positions \
    --out "$OUT/endless-stream" --resume
lola eval recall --tasks niah-1 --distances "$DISTANCES" --samples "$SAMPLES" --texts models/texts \
    --model models/smollm2-lola --sweep benchmarks/recall/endless-recall.json \
    --untrained-positions --out "$OUT/endless-recall" --resume
.venv/bin/python benchmarks/endless_sums.py --out "$OUT/endless-sums.json"
.venv/bin/python -m tools.endless --model models/smollm2-lola --texts models/texts \
    --lola-config '{"context_shift": 2048, "sparse_cache_size": 512}' --tokens "$TOKENS" \
    --edge $((TOKENS / 10)) --out "$OUT/endless-text.json"
.venv/bin/python -m tools.long_sequence --model models/smollm2-lola --texts models/texts \
    --lola-config '{"context_shift": 2048}' --tokens "$TOKENS" --out "$OUT/endless-sequence.json"
