"""Methods that shrink a KV cache after reading, beside LoLA at as many bytes a sequence.

The methods are kvpress's, on the softmax model that a LoLA model comes from. They are asked the
prompts of `lola-vllm eval recall`, and the results have its form. All of a prompt but its last
line, which asks, is read before a method chooses what it keeps: a question is not known when a text
is read in a conversation. LoLA's own row is of `lola-vllm eval recall`.

kvpress takes other versions of transformers than vLLM, so they are installed aside
(`benchmarks/peers.sh`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import MIB, parser_of
from kvpress import (
    AdaKVPress,
    BasePress,
    ExpectedAttentionPress,
    KVPressTextGenerationPipeline,
    KVzipPress,
    SnapKVPress,
    StreamingLLMPress,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from lola_vllm.evaluation.comparison import Comparison
from lola_vllm.evaluation.engine import dtype_of
from lola_vllm.evaluation.models import Tokenizer
from lola_vllm.evaluation.plan import at_least, numbers, words
from lola_vllm.evaluation.prompts import Prompt
from lola_vllm.evaluation.recall import RecallPlan, answer_row
from lola_vllm.evaluation.results import Record, fingerprint
from lola_vllm.evaluation.settings import Setting, measure

# As kvpress's own table of results has them. KVzip reads the text again to score its pairs.
METHODS = {
    "StreamingLLM": StreamingLLMPress,
    "SnapKV": SnapKVPress,
    "AdaKV, expected attention": lambda ratio: AdaKVPress(
        ExpectedAttentionPress(ratio, epsilon=0.01)
    ),
    "KVzip": KVzipPress,
}
READS_AGAIN = ("KVzip",)


@dataclass
class Kept:
    """What a method keeps of a text.

    Attributes:
        cache: pairs. masked: by layer, pairs in it that a method of unequal heads leaves out.
    """

    cache: Any
    masked: list[Any]


class Together(BasePress):
    """One reading of a text for several methods, which changes no pair itself.

    Args:
        presses: by name.

    Attributes:
        kept: of each, once the text is read.
    """

    def __init__(self, presses: dict[str, BasePress]) -> None:
        self.presses = presses
        self.kept = {name: Kept(DynamicCache(), []) for name in presses}

    def post_init_from_model(self, model: Any) -> None:
        for press in self.presses.values():
            press.post_init_from_model(model)

    def compress(
        self, module: Any, hidden: Any, keys: Any, values: Any, attentions: Any, kwargs: Any
    ) -> Any:
        for name, press in self.presses.items():
            module.masked_key_indices = None
            found = press.compress(module, hidden, keys, values, attentions, kwargs)
            # A copy: kvpress writes over keys that are masked.
            self.kept[name].cache.update(*(tensor.clone() for tensor in found), module.layer_idx)
            self.kept[name].masked.append(module.masked_key_indices)
        module.masked_key_indices = None
        return keys, values


class Peers:
    """The softmax model with each method.

    Args:
        base: the model. names: of methods. pairs: that each keeps a KV head, on average.
    """

    def __init__(self, base: Setting, names: list[str], pairs: int) -> None:
        self.names, self.pairs = names, pairs
        dtype = dtype_of(base, {})
        self._model: Any = AutoModelForCausalLM.from_pretrained(base.model, dtype=dtype).eval()
        self.dtype = str(self._model.dtype).removeprefix("torch.")
        self._layers = [layer.self_attn for layer in self._model.model.layers]
        tokenizer = AutoTokenizer.from_pretrained(base.model)
        self._pipeline = KVPressTextGenerationPipeline(self._model, tokenizer)

    @torch.no_grad()
    def answers(
        self, context: list[int], question: list[int], room: int
    ) -> dict[str, tuple[str, float]]:
        """Greedy answers of at most `room` tokens by method, and the seconds that each took beside
        the reading that they share."""
        ratio = max(0.0, 1 - self.pairs / len(context))
        presses = {name: METHODS[name](ratio) for name in self.names}
        once = Together({n: press for n, press in presses.items() if n not in READS_AGAIN})
        if once.presses:
            self._read(once, context)
        kept, found = once.kept, {}
        for name in self.names:
            began = time.monotonic()
            held = kept.pop(name, None) or self._read(presses[name], context)
            for layer, masked in zip(self._layers, held.masked, strict=True):
                layer.masked_key_indices = masked
            ids = torch.tensor([question])
            answer = self._pipeline.generate_answer(ids, held.cache, len(context), room)
            found[name] = answer, time.monotonic() - began
        return found

    def _read(self, press: BasePress, context: list[int]) -> Kept:
        cache = DynamicCache()
        with press(self._model):
            self._model.model(input_ids=torch.tensor([context]), past_key_values=cache)
        return Kept(cache, [getattr(layer, "masked_key_indices", None) for layer in self._layers])


def split(prompt: Prompt, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The tokens of a prompt before its last line, and the rest."""
    asks = prompt.question.text.rpartition("\n")[2]
    at = len(prompt.ids) - 1
    while asks not in tokenizer.decode(prompt.ids[at:]):
        at -= 1
    return prompt.ids[:at], prompt.ids[at:]


def main() -> None:
    parser = parser_of(__doc__)
    parser.set_defaults(out=Path("eval-results/peers"))
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--texts", required=True)
    parser.add_argument("--methods", default="; ".join(METHODS), help="with semicolons between")
    parser.add_argument("--memory", type=float, default=9.59, help="MiB of pairs a sequence")
    parser.add_argument("--bits", type=int, default=8, help="of a number of a pair, as counted")
    parser.add_argument("--tasks", type=words, default=["niah-3", "multivalue", "multiquery", "vt"])
    parser.add_argument("--lengths", type=numbers, default=[4096, 8192])
    parser.add_argument("--samples", type=at_least(1), default=3)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()

    plan = RecallPlan(args.tasks, args.lengths, args.samples, args.seed, args.texts)
    plan.check()
    names = [name.strip() for name in args.methods.split(";")]
    if unknown := [name for name in names if name not in METHODS]:
        parser.error(f"--methods {unknown[0]!r}: choose from {'; '.join(METHODS)}")
    settings = [Setting(name, args.base) for name in names]
    memory = measure(settings[0], "bfloat16")
    assert memory is not None
    per_pair = memory.full_kv_bytes_per_token * args.bits / 16  # in every KV head
    peers = Peers(settings[0], names, int(args.memory * MIB / per_pair))
    memory = replace(memory, state_bytes=int(peers.pairs * per_pair))
    base = fingerprint(args.base)
    records = [Record(setting, base, memory, dtype=peers.dtype) for setting in settings]
    comparison = Comparison(args.out, plan, records, 1)
    comparison.begin(resume=True)
    done = plan.done(records[-1].samples)
    tokenizer = Tokenizer(args.base)
    for prompts, room in plan.prompts(tokenizer):
        for prompt in prompts:
            if (prompt.task, prompt.length, prompt.aim, prompt.index) in done:
                continue
            found = peers.answers(*split(prompt, tokenizer), room)
            for record in records:
                answer, seconds = found[record.setting.name]
                record.samples.append(answer_row(prompt, answer))
                record.seconds += seconds
            comparison.save()
    for record in records:
        record.finished = True
    comparison.save()
    print(comparison.table())


if __name__ == "__main__":
    main()
