#!/usr/bin/env bash
# The recall and perplexity tables of docs/recall.md, from nothing: about half a day on two CPU
# cores, most of them for the questions in prose of 4,096 and 8,192 tokens. docs/evaluation.md,
# "Results on these pages", says how the summaries become the tables.
#
#   make recall                answers and summaries in eval-results/; run it again to go on
#   SAMPLES=10 make recall     a quicker look, in about three hours
. "$(dirname "$0")/eval_common.sh"

[ -d models/smollm2-uncalibrated ] ||
    lola demo-model --uncalibrated --out models/smollm2-uncalibrated

recall() { # NAME SWEEP TASKS LENGTHS: the settings of benchmarks/recall/SWEEP.json
    lola eval recall --model models/smollm2-lola --sweep "benchmarks/recall/$2.json" \
        --tasks "$3" --lengths "$4" --texts models/texts --samples "$SAMPLES" --seed "$SEED" \
        --out "$OUT/$1" --resume
}
recall shipped shipped niah-1,niah-2,niah-3,multikey 1024,2048,4096,8192
# What each part does, and what training alone changes.
parts() { # VERB NAME SEED OPTION...
    lola eval "$1" --model models/smollm2-lola --reference models/smollm2-base \
        --lola-config 'as it ships={}' --sweep benchmarks/recall/demo-parts.json \
        --texts models/texts --seed "$3" --out "$OUT/$2" --resume "${@:4}"
}
for seed in 1 2 3; do
    parts recall "parts-$seed" "$seed" \
        --tasks niah-2,multikey,multivalue --lengths 2048,4096 --samples 4
done
parts perplexity perplexity-parts "$SEED" --windows 2 --window-length 2048
lola eval perplexity --model models/smollm2-lola --reference models/smollm2-base \
    --sweep benchmarks/recall/shipped.json --texts models/texts \
    --windows 4 --window-length 2048 --out "$OUT/perplexity" --resume
# Text unlike what it was trained on: code, and another language.
texts --out models/other --only python_code debian_handbook_fr
lola eval perplexity --model models/smollm2-lola --reference models/smollm2-base \
    --lola-config 'as it ships={}' --texts models/other \
    --windows 4 --window-length 2048 --out "$OUT/perplexity-other" --resume
# Passages, word by word.
copy() { # NAME TEXTS LENGTHS DISTANCES OPTIONS...
    lola eval copy --model models/smollm2-lola --reference models/smollm2-base --texts "$2" \
        --lengths "$3" --distances "$4" --lola-config 'as it ships={}' --batch 28 --seed "$SEED" \
        --engine-args '{"dtype": "float32"}' --out "$OUT/copy-$1" --resume "${@:5}"
}
copy prose models/texts 2000,7000 250,500,1000,2000,3000,4000,6000 --kinds prose --samples 5
copy kinds models/texts 7000 250,500,1000,2000,3000,4000 --kinds documentation --samples 3
copy code models/other 7000 250,500,1000,2000,3000,4000 --kinds code --samples 3
copy long models/texts 100000 250,500,1000,2000,4000 --kinds prose
# What was said in a conversation.
chat() { # LENGTH SAMPLES [OPTION...]
    lola eval recall --model models/smollm2-lola --texts models/texts \
        --tasks chat-fact,chat-name,chat-instruction,chat-code --lengths "$1" --samples "$2" \
        --lola-config 'as it ships={}' --out "$OUT/chat-$1" --resume "${@:3}"
}
chat 2000 20 --reference models/smollm2-base
chat 7000 20 --reference models/smollm2-base
chat 30000 6 # more than the base can read
# The picture of the front page.
recall memory memory niah-1 1024,2048,4096,8192
