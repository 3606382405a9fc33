"""A tiny LoLA checkpoint with a tokenizer and a chat template: a server of it answers in
milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from tools.support.server_process import BIN
from tools.support.tiny import VOCAB, make_tiny

LOLA = {"window_size": 16, "sparse_cache_size": 24, "sink_size": 2}
END = "<|end|>"
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def make_speaking(out: Path, lola_config: dict[str, Any] = LOLA, **fields: Any) -> Path:
    """`make_tiny`, with byte-level tokens that were learnt from this project's own words.

    They lie in a file, as an answer of random weights is another one with other tokens.
    """
    make_tiny(out, lola_config, **fields)
    tokenizer = Tokenizer.from_file(str(Path(__file__).with_suffix(".json")))
    assert tokenizer.get_vocab_size() == VOCAB
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, chat_template=TEMPLATE
    ).save_pretrained(out)
    return out


def serve_speaking(model: Path, name: str) -> list[str]:
    """The command that serves it under this name; `serving` adds host and port.

    Stored states are as a plain `lola-vllm serve` has them: with shared prefixes, and without
    vLLM's prefix caching, which `--block-size` would switch on.
    """
    return [
        str(BIN / "lola-vllm"), "serve", str(model), "--served-model-name", name,
        "--enforce-eager", "--dtype", "float32", "--max-model-len", "2048",
        "--max-num-seqs", "16", "--max-num-batched-tokens", "256",
    ]  # fmt: skip
