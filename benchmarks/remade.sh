#!/usr/bin/env bash
# The demo model made anew by `lola-vllm linearize`, beside the one that ships, as docs/linearize.md
# shows them: about three and a half hours of one CPU core, two of them for the model.
#
#   make recall-remade    answers and summaries in eval-results/; run it again to go on
. "$(dirname "$0")/eval_common.sh"

[ -f models/remade/config.json ] || lola linearize --base models/smollm2-base \
    --out models/remade --texts models/texts --hours 2.25 --resume

compare() { # VERB NAME SEED OPTION...
    lola eval "$1" --model models/smollm2-lola --reference models/smollm2-base \
        --sweep benchmarks/recall/remade.json --texts models/texts --seed "$3" \
        --out "$OUT/remade-$2" --resume "${@:4}"
}
for seed in 11 12 13; do # no choice was made with these
    compare recall "tasks-$seed" "$seed" \
        --tasks niah-1,niah-2,niah-3,multikey --lengths 1024,2048,4096 --samples 4
    compare recall "facts-$seed" "$seed" \
        --tasks fact-name,fact-date,fact-code,fact-place --lengths 1024,2048 --samples 2
done
compare perplexity perplexity 11 --windows 2 --window-length 2048
compare copy copy 11 --kinds prose --lengths 2000,7000 --distances 250,500,1000,2000,4000 \
    --samples 3 --batch 28 --engine-args '{"dtype": "float32"}'
