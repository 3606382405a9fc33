#!/usr/bin/env bash
# The recall tables of docs/linearize.md, of Qwen2.5-Coder-0.5B, from nothing: hours on two CPU
# cores. docs/evaluation.md, "Results on these pages", says how the summaries become the tables.
#
#   make recall-qwen    answers and summaries in eval-results/; run it again to go on
. "$(dirname "$0")/eval_common.sh"

# The texts of its training, of which other documents are asked for.
[ -d models/qwen-texts ] || cp -r models/texts models/qwen-texts
[ -f models/qwen-texts/python_code.txt ] || texts --out models/qwen-texts --only python_code

recall() { # NAME SWEEP SAMPLES TASKS LENGTHS OPTION...: with seeds 1 to 3
    for seed in 1 2 3; do
        lola eval recall --model models/qwen-lola --sweep "benchmarks/recall/$2.json" \
            --samples "$3" --tasks "$4" --lengths "$5" --texts models/qwen-texts --seed "$seed" \
            --batch 2 --out "$OUT/qwen-$1-$seed" --resume "${@:6}"
    done
}
recall needles qwen 2 niah-1,niah-2 4096,8192,16384
recall tasks qwen 3 niah-3,multikey,multivalue,multiquery,vt 4096
recall longer qwen 3 niah-3,multikey,multivalue,multiquery,vt 8192
# A line of code that needs a definition read so many tokens before.
recall code qwen 3 code-call 4096,10240 --distances 2000,8000
lola eval perplexity --model models/qwen-lola --reference models/qwen-base \
    --lola-config 'as it ships={}' --texts models/qwen-texts --seed "$SEED" \
    --windows 1 --window-length 4096 --out "$OUT/qwen-perplexity" --resume
lola eval copy --model models/qwen-lola --reference models/qwen-base --texts models/qwen-texts \
    --kinds prose,code --lengths 10000 --distances 250,500,1000,2000,4000,8000 --samples 2 \
    --lola-config 'as it ships={}' --batch 28 --seed "$SEED" --out "$OUT/qwen-copy" --resume
