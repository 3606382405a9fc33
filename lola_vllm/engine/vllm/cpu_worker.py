"""vLLM's CPU worker, with seeded sampling of prompts that are prefilled in pieces, and drafts.

A row whose prompt is not at its end is sampled all the same, and vLLM 0.32 then takes the random
numbers back by the generator's offset. Generators of a CPU have none: the engine dies of `CPU
Generator does not use offset`. Any client could bring that about with a seed and a long prompt,
with prefix caching one longer than a block. Here the generator's state is put back instead. Can go
when vLLM does the same. `config_hook` chooses this class, as `--worker-cls` would.

With prefix caching vLLM 0.32 moves the states of accepted drafts by Triton kernels, which a CPU
lacks. A LoLA state needs no moves. vLLM's n-grams run in numba, whose OpenMP layer would change how
many threads torch has.

vLLM 0.32 stores what torch.compile made, and on a CPU fails to load it at the next start, since it
calls a method that only the compiler of its GPU engines has. It then compiles again.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

from lola_vllm.core import cpu
from lola_vllm.engine.vllm.cpu_norms import prefer_cpp_norms
from lola_vllm.memory.sessions.settings import STORE_KEY


class LolaCPUModelRunner(CPUModelRunner):
    """Rewinds CPU generators by their state, and leaves a state where its drafts were accepted."""

    def _update_states_after_model_execute(self, *_: Any) -> None:
        """Nothing: what was accepted is in the token counts."""

    def _get_mamba_bufs(self) -> Any:
        """vLLM's own, which without drafts copies states at block boundaries and does no more."""
        drafts, self.speculative_config = self.speculative_config, None
        try:
            return super()._get_mamba_bufs()
        finally:
            self.speculative_config = drafts

    def _sample(self, *args: Any, **kwargs: Any) -> Any:
        """Sample; rows whose prompt goes on get their random numbers back."""
        discarded = self.discard_request_mask.np
        generators = [g for row, g in self.input_batch.generators.items() if discarded[row]]
        states = [generator.get_state() for generator in generators]
        output = super()._sample(*args, **kwargs)
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        return output

    def _bookkeeping_sync(self, *args: Any, **kwargs: Any) -> Any:
        """vLLM's own, which finds no generator to rewind by offset."""
        generators, discarded = self.input_batch.generators, self.discard_request_mask.np
        self.input_batch.generators = {r: g for r, g in generators.items() if not discarded[r]}
        try:
            return super()._bookkeeping_sync(*args, **kwargs)
        finally:
            self.input_batch.generators = generators


@functools.cache
def load_what_was_compiled() -> None:
    """Let vLLM load compiled code that has no `finalize_loading`, which is ready as it is."""
    load: Any = torch.compiler.load_compiled_function

    @functools.wraps(load)
    def loaded(*args: Any, **kwargs: Any) -> Any:
        found = load(*args, **kwargs)
        compiled = found._artifacts.compiled_fn
        if not hasattr(compiled, "finalize_loading"):
            compiled.finalize_loading = lambda vllm_config: None
        return found

    torch.compiler.load_compiled_function = loaded


def name_compiled_code(vllm_config: VllmConfig) -> None:
    """Let the name of stored code say the CPU, for which it is, and not where states are stored.

    vLLM's name has `additional_config`. The connector has the store's settings already.
    """
    given = vllm_config.additional_config
    if isinstance(given, dict):
        others = {key: value for key, value in given.items() if key != STORE_KEY}
        vllm_config.additional_config = {**others, "cpu": sorted(cpu.flags())}


class LolaCPUWorker(CPUWorker):
    """A CPU worker with that runner, and those norms or that compiled code."""

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        if vllm_config.model_config.enforce_eager:
            prefer_cpp_norms(vllm_config.kernel_config.ir_op_priority)
        else:
            load_what_was_compiled()
            name_compiled_code(vllm_config)
        super().__init__(vllm_config, *args, **kwargs)

    def init_device(self) -> None:
        """Start as vLLM's worker does, which names the runner's class in here."""
        if self.vllm_config.speculative_config is not None:
            import numba  # takes a second

            numba.config.THREADING_LAYER = "workqueue"
        super().init_device()
        if not self.use_v2_model_runner:  # the second runner draws without generators
            self.model_runner.__class__ = LolaCPUModelRunner
