"""vLLM engines in this process, one after the other, and what tests look at inside them."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from multiprocessing import context
from typing import Any
from unittest import mock

import pytest
import torch
from vllm import LLM, SamplingParams, TokensPrompt
from vllm.platforms import current_platform
from vllm.v1.executor import multiproc_executor

GREEDY = {"temperature": 0.0, "ignore_eos": True, "detokenize": False}


@functools.cache
def replace_kernels_once() -> None:
    """vLLM's platform replaces Triton's kernels at each start of an engine, by a search through all
    modules that takes longer than the rest of the start. Once per process is enough."""
    register = getattr(current_platform, "register_triton_kernel_overrides", None)
    if register is not None:
        once = functools.cache(register)
        type(current_platform).register_triton_kernel_overrides = staticmethod(once)


def not_compiled(eager: bool = True) -> AbstractContextManager[None]:
    """vLLM compiles a few small functions, of log-probabilities, of sampling and of embeddings that
    ranks share, in each process and in eager engines too; here it does not."""
    return torch.compiler.set_stance("force_eager" if eager else "default")


def _as_here(
    environment: dict[str, str], eager: bool, target: Callable[..., None], **given: Any
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    with not_compiled(eager):
        target(**given)


class _Forking(context.ForkServerContext):
    """Workers are forked from a process that has imported vLLM, where each would import it."""

    def Process(self, *, target: Callable[..., None], **options: Any) -> Any:
        eager = options["kwargs"]["vllm_config"].model_config.enforce_eager
        started = functools.partial(_as_here, dict(os.environ), eager, target)
        return super().Process(target=started, **options)


@functools.cache
def fork_workers() -> None:
    """vLLM starts the workers of several ranks so, in the place of its "spawn"."""
    forking = _Forking()
    forking.set_forkserver_preload(["vllm.entrypoints.llm", "vllm.v1.worker.cpu_worker"])
    multiproc_executor.get_mp_context = lambda: forking


@contextlib.contextmanager
def _no_collections() -> Iterator[None]:
    """vLLM collects garbage nine times in an engine's life, each time over all its modules."""
    with mock.patch.object(gc, "collect", lambda *_: 0):
        yield


@contextlib.contextmanager
def engine(model: Any, **options: Any) -> Iterator[LLM]:
    """An eager float32 engine in this process; freed on exit."""
    defaults: dict[str, Any] = {
        "model": str(model),
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "enforce_eager": True,
        "kv_cache_memory_bytes": 64 * 2**20,
        "max_model_len": 2048,
        "disable_log_stats": False,
        "enable_prefix_caching": False,
    }
    options = {**defaults, **options}
    replace_kernels_once()
    fork_workers()
    with not_compiled(options["enforce_eager"]):
        with _no_collections():
            llm = LLM(**options)
        try:
            yield llm
        finally:
            from vllm.distributed import cleanup_dist_env_and_memory

            with _no_collections():
                llm.llm_engine.engine_core.shutdown()
                del llm
                cleanup_dist_env_and_memory()
            gc.collect()
            gc.freeze()  # the next start does not look through what stays


def assert_refused(model: Any, words: str, **options: Any) -> None:
    """An engine with these options does not start; what it says matches."""
    with pytest.raises(Exception, match=words), engine(model, **options):
        pass


def generate(
    llm: LLM, prompts: list[list[int]], max_tokens: int = 24, **sampling: Any
) -> list[list[int]]:
    """Greedy tokens of each prompt, all submitted at once."""
    params = SamplingParams(max_tokens=max_tokens, **{**GREEDY, **sampling})
    requests = [TokensPrompt(prompt_token_ids=p) for p in prompts]
    return [list(o.outputs[0].token_ids) for o in llm.generate(requests, params, use_tqdm=False)]


def store_options(
    directory: Any = None, ram: str = "64MiB", **more: Any
) -> dict[str, dict[str, dict[str, Any]]]:
    """Options of an engine that stores all states, in memory and in a directory if one is given."""
    lola = {"state_ram": ram, "store": "all", **more}
    if directory is not None:
        lola["state_dir"] = str(directory)
    return {"additional_config": {"lola": lola}}


def ask(
    llm: LLM, prompt: list[int], new: int = 12, salt: str = "", lora: Any = None, **lola: Any
) -> tuple[list[int], Any]:
    """Greedy tokens, and what the answer says of the store.

    Args:
        lola: what is asked of the store, such as `from_`.
    """
    extra = {"kv_transfer_params": {"lola": {k.strip("_"): v for k, v in lola.items()}}}
    params = SamplingParams(max_tokens=new, extra_args=extra, **GREEDY)
    request = TokensPrompt(prompt_token_ids=prompt)
    if salt:
        request["cache_salt"] = salt
    (output,) = llm.generate([request], params, use_tqdm=False, lora_request=lora)
    return list(output.outputs[0].token_ids), (output.kv_transfer_params or {}).get("lola")


def prompt_logprobs(
    llm: LLM, prompts: list[list[int]], max_tokens: int = 1
) -> tuple[list[list[int]], list[list[float]]]:
    """Greedy tokens of each prompt, and the log-probability of each of its tokens but the first."""
    params = SamplingParams(max_tokens=max_tokens, prompt_logprobs=0, **GREEDY)
    requests = [TokensPrompt(prompt_token_ids=p) for p in prompts]
    outputs = llm.generate(requests, params, use_tqdm=False)
    logprobs = [
        [row[token].logprob for row, token in zip(o.prompt_logprobs[1:], p[1:], strict=True)]
        for o, p in zip(outputs, prompts, strict=True)
    ]
    return [list(o.outputs[0].token_ids) for o in outputs], logprobs


def scheduler(llm: LLM) -> Any:
    """The scheduler of an in-process engine."""
    return llm.llm_engine.engine_core.engine_core.scheduler


def block_pool(llm: LLM) -> Any:
    """vLLM's pool of states."""
    return scheduler(llm).kv_cache_manager.block_pool


def state_manager(llm: LLM) -> Any:
    """Our block manager."""
    return scheduler(llm).kv_cache_manager.coordinator.single_type_managers[0]


def pages(llm: LLM) -> list[torch.Tensor]:
    """Every layer's raw pages `[num_blocks, page_bytes]`."""
    from lola_vllm.engine.vllm.attention import LolaAttention

    model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model()
    return [m.state.pages for m in model.modules() if isinstance(m, LolaAttention)]


def metric(llm: LLM, name: str) -> float:
    """A counter or gauge of the engine."""
    return sum(m.value for m in llm.get_metrics() if m.name == name)
