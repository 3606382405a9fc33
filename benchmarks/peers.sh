#!/usr/bin/env bash
# Methods that shrink a KV cache, in the table of docs/linearize.md, after `make recall-qwen`, which
# gets the texts: some three hours on two CPU cores. kvpress takes another transformers than vLLM, so
# both lie in a folder that nothing else reads.
. "$(dirname "$0")/eval_common.sh"

[ -d models/kvpress ] || .venv/bin/python -m pip install --quiet --target models/kvpress --no-deps \
    kvpress==0.5.5 transformers==5.2.0 tokenizers==0.22.2 'huggingface-hub<2' 'cachetools<6' \
    'fire<0.7' six termcolor

peers() { # NAME SEED LENGTHS METHODS: the questions of `make recall-qwen`
    PYTHONPATH=models/kvpress .venv/bin/python benchmarks/peers.py --base models/qwen-base \
        --texts models/qwen-texts --lengths "$3" --seed "$2" --methods "$4" --out "$OUT/peers-$1-$2"
}
for seed in 1 2; do
    peers ada "$seed" 4096,8192 "AdaKV, expected attention"
done
peers others 1 4096,8192 "StreamingLLM; SnapKV"
peers kvzip 1 4096,8192 KVzip
