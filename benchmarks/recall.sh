#!/usr/bin/env bash
# The recall and perplexity tables of docs/recall.md, from nothing: about half a day on two CPU
# cores, most of them for the questions in prose of 4,096 and 8,192 tokens.
#
#   make recall                results in eval-results/; run it again to go on with an interrupted run
#   SAMPLES=10 make recall     a quicker look, in about three hours
. "$(dirname "$0")/eval_common.sh"

[ -d models/smollm2-untrained ] || lola demo-model --untrained --out models/smollm2-untrained

recall() { # NAME TASKS LENGTHS: the settings of benchmarks/recall/NAME.json
    lola eval recall --model models/smollm2-lola --sweep "benchmarks/recall/$1.json" \
        --tasks "$2" --lengths "$3" --texts models/texts --samples "$SAMPLES" \
        --out "$OUT/$1" --resume
}
recall shipped niah-1,niah-2,niah-3,multikey,passkey 1024,2048,4096,8192
recall main niah-1,niah-2,niah-3,multikey,passkey 1024,2048,4096,8192
recall ablations niah-1 1024
recall calibrated niah-1,niah-2 1024,2048,4096
recall equal-bytes niah-1,niah-2 4096
recall by-head niah-1,niah-2 1024,2048,4096
recall held-out fact-name,fact-date,fact-code,fact-place 1024,2048,4096
lola eval perplexity --model models/smollm2-lola --reference models/smollm2-base \
    --sweep benchmarks/recall/calibrated.json --texts models/texts \
    --windows 4 --window-length 2048 --out "$OUT/calibrated-perplexity" --resume
lola eval perplexity --model models/smollm2-lola --reference models/smollm2-base \
    --sweep benchmarks/recall/by-head.json --texts models/texts \
    --windows 4 --window-length 2048 --out "$OUT/by-head-perplexity" --resume
lola eval perplexity --model models/smollm2-lola --reference models/smollm2-base \
    --sweep benchmarks/recall/perplexity.json --texts models/texts \
    --windows 8 --window-length 2048 --out "$OUT/perplexity" --resume
