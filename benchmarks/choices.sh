#!/usr/bin/env bash
# What sinks, the mixing and the state heads are worth: a small training for each, all alike but for
# the one choice, and their recall. About half an hour on two CPU cores.
#
#   make choices      models in models/small-*, results in eval-results/choices
. "$(dirname "$0")/eval_common.sh"

train() { # NAME SINKS MIXING STATE_HEADS: stage 1 only, 32,768 tokens
    [ -d "models/small-$1" ] || lola distill --base models/smollm2-base --data models/texts \
        --out "models/small-$1" --work-dir "models/small-$1.training" --resume \
        --lola-config "{\"sink_size\": $2, \"mixing\": \"$3\"}" \
        --recipe "{\"train_sparse_caches\": [0, 128], \"rows\": 16, \"steps_per_row\": 6,
            \"lora_rows\": 0, \"state_heads\": \"$4\"}"
}
train kv 4 lola kv
train query 4 lola query
train nosinks 0 lola kv
train lolcats 4 lolcats kv
lola eval recall --model models/small-kv --sweep benchmarks/recall/choices.json \
    --tasks niah-1 --lengths 1024 --samples "$SAMPLES" --out "$OUT/choices" --resume
