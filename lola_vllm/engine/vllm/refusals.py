"""Options of vLLM that cannot be used with a LoLA model, refused before anything is allocated.

Every refusal names the option, its value and the remedy.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lola_vllm.core.config import DecoderConfig
from lola_vllm.core.ops.shift_schedule import MAX_LENGTH
from lola_vllm.core.ranks import check_ranks, heads_divide
from lola_vllm.engine.vllm.cache import sequence_layout
from lola_vllm.engine.vllm.connectors import has_store
from lola_vllm.models.files import open_weights, weight_files

if TYPE_CHECKING:
    from vllm.config import VllmConfig


# Methods that make drafts of tokens alone.
DRAFTS = ("ngram", "suffix", "custom_class")

# The scheduler and the worker of a CPU that take drafts. Names, for vLLM imports them.
SCHEDULER = "lola_vllm.engine.vllm.drafts.LolaScheduler"
CPU_WORKER = "lola_vllm.engine.vllm.cpu_worker.LolaCPUWorker"


class UnsupportedOptionError(ValueError):
    """A vLLM option that cannot work with LoLA's state."""


def _unfit(option: str, value: object, reason: str) -> UnsupportedOptionError:
    return UnsupportedOptionError(
        f"{option} = {value!r} cannot be used with a LoLA model: {reason}"
    )


def refuse(vllm_config: VllmConfig) -> None:
    """Raise `UnsupportedOptionError` for the first option that does not know LoLA's state."""
    _refuse_drafts(vllm_config)
    reason = (
        "vLLM's connectors are not known to move whole states; remove the option: LoLA's own store "
        "is --additional-config '{\"lola\": {...}}'"
    )
    transfer = vllm_config.kv_transfer_config
    if transfer is not None and not has_store(vllm_config):
        raise _unfit("--kv-transfer-config", transfer.kv_connector, reason)
    offloaded = vllm_config.cache_config.kv_offloading_size
    if offloaded is not None:
        raise _unfit("--kv-offloading-size", offloaded, reason)
    cache_dtype = vllm_config.cache_config.cache_dtype
    if cache_dtype not in ("auto", "bfloat16"):
        raise _unfit(
            "--kv-cache-dtype",
            cache_dtype,
            "keys and values are kept in the model's dtype, and the hidden state in float32; "
            "use 'auto'",
        )
    length = vllm_config.model_config.max_model_len
    if length > MAX_LENGTH:
        raise _unfit(
            "--max-model-len",
            length,
            f"a page holds positions as 32-bit numbers; use at most {MAX_LENGTH}",
        )
    parallel = vllm_config.parallel_config
    if parallel.decode_context_parallel_size > 1:
        raise _unfit(
            "--decode-context-parallel-size",
            parallel.decode_context_parallel_size,
            "a state is not a list of tokens that could be split; use 1",
        )
    if parallel.enable_dbo:
        raise _unfit("--enable-dbo", True, "a step's rows are not cut in two; remove the option")
    _refuse_on_cpu(vllm_config)


def _refuse_drafts(vllm_config: VllmConfig) -> None:
    """Drafts that a state cannot take back, by who makes them, by the layers, or by options."""
    from vllm.platforms import current_platform

    speculative, scheduler = vllm_config.speculative_config, vllm_config.scheduler_config
    if speculative is None:
        return
    method = speculative.method

    def no_drafts(reason: str) -> UnsupportedOptionError:
        return _unfit("--speculative-config", method, reason)

    if method not in DRAFTS:
        raise no_drafts(
            "vLLM lays out the layers of a draft model one by one, in blocks as large as a state, "
            "which its drafter refuses, and drafts on a GPU are made ahead of results; use 'ngram'"
        )
    sequence = sequence_layout(vllm_config)
    intervals = sorted({layout.update_interval for layout in sequence.layouts})
    if any(layer.slides for layer in sequence.layers):
        raise no_drafts("the ring of a sliding layer has no row for a draft; remove the option")
    if intervals[0] == 1:
        raise no_drafts(
            "with an update_interval of 1 an update follows every token, and cannot be undone; "
            "remove the option"
        )
    if len(intervals) > 1:
        raise no_drafts(f"the layers are updated every {intervals} tokens; remove the option")
    if vllm_config.use_v2_model_runner:
        raise no_drafts(
            "vLLM's second model runner does not take drafts back so; set "
            "VLLM_USE_V2_MODEL_RUNNER=0"
        )
    if scheduler.async_scheduling:
        raise _unfit(
            "--async-scheduling",
            True,
            "a step with drafts is planned when the one before is known; remove the option",
        )
    if scheduler.scheduler_cls not in (None, SCHEDULER):
        raise _unfit(
            "--scheduler-cls",
            scheduler.scheduler_cls,
            "with --speculative-config the scheduler cuts drafts at updates; remove one of the two",
        )
    worker = vllm_config.parallel_config.worker_cls
    if current_platform.is_cpu() and worker not in ("auto", CPU_WORKER):
        raise _unfit("--worker-cls", worker, "drafts need LoLA's own on a CPU; remove the option")


def _refuse_on_cpu(vllm_config: VllmConfig) -> None:
    """Options with which vLLM 0.32 itself, on a CPU, fails later or answers wrongly."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    stages = vllm_config.parallel_config.pipeline_parallel_size
    if stages > 1 and vllm_config.model_config.enforce_eager:
        raise _unfit(
            "--pipeline-parallel-size",
            stages,
            "on a CPU, vLLM makes the tensors that stages hand over while it compiles, and "
            "would fail at the first request; drop --enforce-eager",
        )
    lora = vllm_config.lora_config
    if lora is not None and lora.max_loras == 1:
        raise _unfit(
            "--max-loras",
            lora.max_loras,
            "on a CPU, vLLM applies the adapter in its last slot to requests for the base "
            "model that share a batch with adapters; use one more than there are adapters",
        )


def check_weight_files(vllm_config: VllmConfig) -> None:
    """Raise `CheckpointError` for a damaged safetensors file of a local model.

    vLLM would find it too, but not say which file it is.
    """
    model = Path(vllm_config.model_config.model)
    if vllm_config.load_config.load_format in ("auto", "hf", "safetensors") and model.is_dir():
        for path in weight_files(model):
            with open_weights(path):
                pass


def check_parallel_heads(config: DecoderConfig, tp_size: int) -> None:
    """Raise unless the heads divide among the tensor-parallel ranks, with the same answers."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    state_heads = config.facts.num_state_heads
    if not heads_divide(tp_size, heads, kv_heads, state_heads):
        raise UnsupportedOptionError(
            f"--tensor-parallel-size = {tp_size}: the model's {heads} query heads, {state_heads} "
            f"state heads and {kv_heads} KV heads cannot be divided among {tp_size} ranks; use a "
            f"divisor of {kv_heads}"
        )
    check_ranks(config.lola, tp_size, kv_heads, state_heads)


def check_prefill_room(vllm_config: VllmConfig) -> None:
    """Raise unless a step that is full of decodes has room for a block of a new prompt.

    With prefix caching vLLM ends the pieces of a prompt at block boundaries. Where the decodes of
    others leave less than a block of a step's budget, the prompt waits for as long as they run.
    """
    block_size = vllm_config.cache_config.block_size
    scheduler = vllm_config.scheduler_config
    option, budget = "--max-num-batched-tokens", scheduler.max_num_batched_tokens
    scheduled = scheduler.max_num_scheduled_tokens  # what the scheduler goes by, where it is given
    if scheduled is not None and scheduled <= budget:
        option, budget = "--max-num-scheduled-tokens", scheduled
    # Where no piece could be as long as a block, vLLM lets them end anywhere.
    piece = min(budget, scheduler.long_prefill_token_threshold or budget)
    others = scheduler.max_num_seqs - 1
    enough = block_size + others * (1 + vllm_config.num_speculative_tokens)
    if block_size <= piece and budget < enough:
        raise UnsupportedOptionError(
            f"{option} = {budget}: with prefix caching in blocks of {block_size} "
            f"tokens a prompt would wait while {others} others decode; "
            f"use at least {enough}, or fewer than {block_size}, or a smaller --block-size or "
            "--max-num-seqs"
        )
