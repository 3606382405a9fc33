"""A model directory in an engine of this process."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from lola_vllm import cpu
from lola_vllm.checkpoint.files import read_json
from lola_vllm.eval.errors import EvalError
from lola_vllm.eval.settings import Setting, measure
from lola_vllm.eval.tokenizer import LocalTokenizer, Tokenizer

# Tokens of one step. Log-probabilities of a prompt take a row of the vocabulary per token.
STEP_TOKENS = 2048
# Set by the evaluation itself, which would be wrong or meaningless with other values.
FIXED_ARGS = ("model", "hf_overrides", "max_model_len", "max_num_seqs", "enable_prefix_caching")


class EngineModel:
    """vLLM in this process; see `models.Model`.

    Args:
        setting: model directory and LoLA parameters.
        max_length: longest prompt and answer together, in tokens.
        batch: sequences that run at once.
        engine_args: more arguments of `vllm.LLM`.

    Raises:
        EvalError: memory for not even one sequence, or an argument that is fixed.
    """

    def __init__(
        self, setting: Setting, max_length: int, batch: int, engine_args: Mapping[str, Any]
    ) -> None:
        for name in FIXED_ARGS:
            if name in engine_args:
                raise EvalError(f"--engine-args: {name} is set by the evaluation; leave it out")
        # Read when vLLM is imported. The engine has this process to itself, so it needs no other.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        from vllm import LLM

        dtype = engine_args.get("dtype", _dtype(setting))
        self.batch = batch
        self.tokenizer: Tokenizer = LocalTokenizer(setting.model)
        overrides = {"lola_config": setting.lola_config} if setting.lola_config else {}
        args: dict[str, Any] = {
            "enforce_eager": True,  # compiling takes longer than it saves here
            "max_num_batched_tokens": max(STEP_TOKENS, batch),
            **_cache_args(setting, max_length, batch, dtype),
            "dtype": dtype,
            **engine_args,
        }
        self._llm = LLM(
            str(setting.model),
            hf_overrides=overrides,
            max_model_len=max_length,
            max_num_seqs=batch,
            # A hit would skip the very prompt whose recall or likelihood is measured, and a
            # sequence would hold two states.
            enable_prefix_caching=False,
            **args,
        )
        self.dtype = str(self._llm.llm_engine.model_config.dtype).removeprefix("torch.")

    def complete(self, prompts: list[list[int]], max_tokens: int) -> list[str]:
        """See `models.Model.complete`."""
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        return [output.outputs[0].text for output in self._generate(prompts, params)]

    def logprobs(self, windows: list[list[int]]) -> list[list[float]]:
        """See `models.Model.logprobs`."""
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        outputs = self._generate(windows, params)
        return [
            [
                entry[token].logprob
                for token, entry in zip(ids[1:], o.prompt_logprobs[1:], strict=True)
            ]
            for ids, o in zip(windows, outputs, strict=True)
        ]

    def _generate(self, prompts: list[list[int]], params: Any) -> list[Any]:
        requests: Any = [{"prompt_token_ids": ids} for ids in prompts]
        return list(self._llm.generate(requests, params, use_tqdm=False))


def _dtype(setting: Setting) -> str:
    """As `lola-vllm serve` chooses it: the one that a CPU is fast in, elsewhere vLLM's choice."""
    import torch

    if torch.cuda.is_available():
        return "auto"
    return cpu.preferred_dtype(read_json(setting.model / "config.json")) or "auto"


def _cache_args(setting: Setting, max_length: int, batch: int, dtype: str) -> dict[str, int]:
    """A KV cache of the right size for softmax attention on a CPU.

    Elsewhere vLLM's own default is right: LoLA's pool follows `max_num_seqs`, and a GPU's memory
    is there to be used, while on a CPU it would take nearly all that the machine has.
    """
    import psutil
    import torch

    if setting.is_lola or torch.cuda.is_available():
        return {}
    memory = measure(setting, dtype if dtype in ("float32", "float16") else "bfloat16")
    room = psutil.virtual_memory().available // 2
    if memory is None:
        return {"kv_cache_memory_bytes": min(room, 4 * 2**30)}
    one = memory.bytes_at(max_length + 256)  # blocks are filled by halves, and one is null
    if one > room:
        raise EvalError(
            f"a KV cache of {max_length} tokens takes {one / 2**30:.1f} GiB, and half of the free "
            f"memory is {room / 2**30:.1f} GiB; ask for shorter lengths"
        )
    return {"kv_cache_memory_bytes": min(room, one * batch)}
