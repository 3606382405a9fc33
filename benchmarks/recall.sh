#!/usr/bin/env bash
# The recall and perplexity tables of docs/recall.md, from nothing: about an hour on two CPU cores.
#
#   make recall                results in eval-results/; run it again to go on with an interrupted run
#   SAMPLES=10 make recall     a quicker look
. "$(dirname "$0")/eval_common.sh"

[ -d models/smollm2-untrained ] || lola demo-model --untrained --out models/smollm2-untrained

recall() { # NAME LENGTHS: questions of benchmarks/recall/NAME.json
    lola eval recall --model models/smollm2-lola --sweep "benchmarks/recall/$1.json" \
        --tasks niah-1 --lengths "$2" --samples "$SAMPLES" --out "$OUT/$1" --resume
}
recall main 1024,2048,4096
recall long 8192
recall ablations 1024
lola eval perplexity --model models/smollm2-lola --reference models/smollm2-base \
    --sweep benchmarks/recall/perplexity.json --texts models/texts \
    --windows 8 --window-length 2048 --out "$OUT/perplexity" --resume
