"""What vLLM asks of a model before anything is allocated: settle defaults, refuse what is wrong."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from lola_vllm.core import cpu
from lola_vllm.core.ops.shift_schedule import ShiftSchedule
from lola_vllm.core.sizing import Pool, cpu_room, gpu_room, weight_bytes
from lola_vllm.engine.vllm import compat
from lola_vllm.engine.vllm.cache import lola_hf_config, row_bytes
from lola_vllm.engine.vllm.connectors import CONNECTOR, CONNECTOR_MODULE, has_store
from lola_vllm.engine.vllm.refusals import (
    CPU_WORKER,
    SCHEDULER,
    UnsupportedOptionError,
    check_parallel_heads,
    check_prefill_room,
    check_weight_files,
    refuse,
)
from lola_vllm.memory.sessions.cipher import KEY_VARIABLE
from lola_vllm.memory.sessions.settings import (
    AUTO,
    STORE_KEY,
    StoreSettings,
    StoreSettingsError,
)
from lola_vllm.models.files import weight_files
from lola_vllm.models.schema import settle_facts

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger("vllm.lola")

# Tokens between two cached states. A state is as large as hundreds of tokens of a full KV cache,
# so a finer grain than this would cost more than it saves.
PREFIX_CACHE_BLOCK_SIZE = 1024

# States that are stored where no number is given, in a part of what running states may take.
STATES, SHARE = 64, 4

# What the routes under /v1/lola ask of the workers. A name, for vLLM imports it in each of them.
WORKER_EXTENSION = "lola_vllm.serving.worker.LolaWorkerExtension"


class LolaModelConfig(VerifyAndUpdateConfig):
    """vLLM's hook for LoLA's architectures."""

    @classmethod
    def verify_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """Read what the tensors say, check the options, and settle sizes."""
        compat.warn_of_untested_vllm()
        compat.warn_of_rust_frontend()
        check_weight_files(vllm_config)
        hf_config = lola_hf_config(vllm_config)
        model = vllm_config.model_config
        settle_facts(hf_config, model.model, model.revision)
        check_parallel_heads(hf_config, vllm_config.parallel_config.tensor_parallel_size)
        settle_sessions(vllm_config)
        refuse(vllm_config)
        settle_drafts(vllm_config)
        announce_context_shift(vllm_config)
        settle_block_size(vllm_config)
        settle_cpu_memory(vllm_config)
        settle_gpu_sequences(vllm_config)
        warn_of_slow_dtype(vllm_config)
        warn_of_cpu_adapters(vllm_config)
        settle_cpu_worker(vllm_config)
        settle_worker_extension(vllm_config)
        announce_compiling(vllm_config)


def settle_sessions(vllm_config: VllmConfig) -> None:
    """Make the store of states vLLM's KV connector, where `--additional-config` asks for one.

    Raises:
        UnsupportedOptionError: a setting that cannot be used, or another connector beside it.
    """
    from vllm.config import KVTransferConfig

    additional = vllm_config.additional_config
    given = additional.get(STORE_KEY) if isinstance(additional, dict) else None
    transfer = vllm_config.kv_transfer_config
    named = transfer is not None and transfer.kv_connector == CONNECTOR
    if named:  # by the user, or by an earlier call
        assert transfer is not None
        given = transfer.kv_connector_extra_config
    if given is None:
        return
    try:
        if not isinstance(given, dict):
            raise StoreSettingsError(f"{STORE_KEY} = {given!r}: must be an object")
        if given.get("state_ram") == AUTO:
            # In place: API processes that start later read the same options, in less free memory.
            given["state_ram"] = default_memory(vllm_config)
        if KEY_VARIABLE in os.environ and "state_key_variable" not in given:
            given = {**given, "state_key_variable": KEY_VARIABLE}  # its name, for each rank
        settings = StoreSettings.from_mapping(given, STORE_KEY)
        settings.key()
        if not settings.enabled and not named:
            return
        parallel = vllm_config.parallel_config
        if transfer is not None and not named:
            raise StoreSettingsError(
                f"--kv-transfer-config {transfer.kv_connector!r} is in the place of LoLA's own "
                "connector; remove one of the two"
            )
        if parallel.nnodes > 1 and settings.directory is not None:
            raise StoreSettingsError(
                "a state directory is for ranks on one machine, and --nnodes is "
                f"{parallel.nnodes}; use state_ram alone"
            )
        if parallel.pipeline_parallel_size > 1:
            raise StoreSettingsError(
                "states are not stored in pipeline stages, whose engine would wait for ever, and "
                f"--pipeline-parallel-size is {parallel.pipeline_parallel_size}; remove one of the "
                "two"
            )
    except StoreSettingsError as error:
        raise UnsupportedOptionError(f"--additional-config = {given!r}: {error}") from None
    vllm_config.kv_transfer_config = KVTransferConfig(
        kv_connector=CONNECTOR,
        kv_connector_module_path=CONNECTOR_MODULE,
        kv_role="kv_both",
        kv_load_failure_policy="recompute",
        kv_connector_extra_config=dict(given),
    )


def settle_drafts(vllm_config: VllmConfig) -> None:
    """Where there are drafts, have a scheduler cut them that knows what the step before brought."""
    if vllm_config.speculative_config is not None:
        vllm_config.scheduler_config.async_scheduling = False
        vllm_config.scheduler_config.scheduler_cls = SCHEDULER


def default_memory(vllm_config: VllmConfig) -> int:
    """Bytes of memory for stored states where the user gives none: the states of `STATES`
    conversations, in a share of what running states may take. 0 where a turn's two states do not
    fit, or where nothing can be stored."""
    parallel = vllm_config.parallel_config
    taken = vllm_config.kv_transfer_config or vllm_config.cache_config.kv_offloading_size
    if taken or parallel.pipeline_parallel_size > 1:
        return 0
    if vllm_config.model_config.runner_type == "pooling":
        return 0
    state = row_bytes(vllm_config) * parallel.world_size
    room = _cpu_room(vllm_config) * parallel.world_size
    states = min(STATES, room // SHARE // state)
    return states * state if states >= 2 else 0


def settle_block_size(vllm_config: VllmConfig) -> None:
    """Choose how many tokens lie between two cached states, when prefix caching is on.

    vLLM 0.32 on CPU would fix 16 tokens here and clip prompts at 128 elsewhere, and then never
    find a cached state; naming the size as the user's own keeps both sides on one number.

    By default vLLM keeps the state at a prompt's end and where it saw two prompts part. It sees
    that by the blocks of full attention, which no LoLA layer has: prompts that begin alike and end
    in more than a block of their own would never hit. So every state at a boundary is kept here; it
    costs no copy and no reserved memory, for it was there anyway and is the first to go.
    """
    cache = vllm_config.cache_config
    if not cache.enable_prefix_caching:
        return
    if not cache.user_specified_block_size:
        cache.block_size = cache.mamba_block_size or PREFIX_CACHE_BLOCK_SIZE
        cache.user_specified_block_size = True
    cache.mamba_block_size = cache.block_size
    if cache.prefix_cache_retention_interval == 0:  # vLLM's default
        cache.prefix_cache_retention_interval = cache.block_size
    logger.info(
        "LoLA prefix caching: a state is kept every %d tokens at most (--block-size), so a shared "
        "prefix shorter than that is computed again; each running sequence holds two states",
        cache.prefix_cache_retention_interval or cache.block_size,
    )
    check_prefill_room(vllm_config)


def settle_cpu_memory(vllm_config: VllmConfig) -> None:
    """On a CPU, size the state pool for `max_num_seqs` sequences when the user has not sized it.

    vLLM would take nearly all of the machine's memory, which a fixed state has no use for. At
    most what `cpu_room` leaves is taken, but enough for one sequence.
    """
    from vllm.platforms import current_platform

    cache = vllm_config.cache_config
    if (
        not current_platform.is_cpu()
        or cache.kv_cache_memory_bytes is not None
        or os.environ.get("VLLM_CPU_KVCACHE_SPACE")
    ):
        return
    max_num_seqs = vllm_config.scheduler_config.max_num_seqs
    pool = Pool.of(row_bytes(vllm_config), "cpu", bool(cache.enable_prefix_caching))
    room = max(_cpu_room(vllm_config), pool.bytes_for(1))
    cache.kv_cache_memory_bytes = min(pool.bytes_for(max_num_seqs), room)
    logger.info(
        "LoLA state pool: %.2f GiB, for --max-num-seqs %d (set --kv-cache-memory-bytes to change)",
        cache.kv_cache_memory_bytes / 2**30,
        max_num_seqs,
    )


def _cpu_room(vllm_config: VllmConfig) -> int:
    """Bytes that a rank's states may take in the machine's own memory."""
    from vllm.platforms import current_platform

    parallel = vllm_config.parallel_config
    workers = max(1, parallel.data_parallel_size_local) * parallel.local_world_size
    weights = _weights(vllm_config) if current_platform.is_cpu() else 0
    free = psutil.virtual_memory().available
    stored = 0
    if has_store(vllm_config):
        assert vllm_config.kv_transfer_config is not None
        given = vllm_config.kv_transfer_config.kv_connector_extra_config
        engines = max(1, parallel.data_parallel_size_local)
        stored = engines * StoreSettings.from_mapping(given).memory
    return cpu_room(free, workers * weights // parallel.world_size, workers, stored)


def _weights(vllm_config: VllmConfig) -> int:
    """Bytes of the weights, all ranks together; 0 where they are not on this machine yet."""
    model = vllm_config.model_config
    path = Path(model.model)
    files = sum(f.stat().st_size for f in weight_files(path)) if path.is_dir() else 0
    dtype = str(model.dtype).removeprefix("torch.")
    return weight_bytes(files, model.hf_config.to_dict(), dtype)


def settle_gpu_sequences(vllm_config: VllmConfig) -> None:
    """On a GPU, run no more sequences at once than there is memory for, by the weights.

    vLLM would end at the capture of CUDA graphs, which takes a state for each sequence.
    """
    from vllm.platforms import current_platform

    cache, scheduler = vllm_config.cache_config, vllm_config.scheduler_config
    if not current_platform.is_cuda() or cache.kv_cache_memory_bytes is not None:
        return
    weights = _weights(vllm_config) // vllm_config.parallel_config.world_size
    memory = current_platform.get_device_total_memory()
    room = gpu_room(memory, cache.gpu_memory_utilization, weights)
    pool = Pool.of(row_bytes(vllm_config), "cuda", bool(cache.enable_prefix_caching))
    fits = pool.sequences_in(room)
    if 1 <= fits < scheduler.max_num_seqs:
        logger.warning(
            "--max-num-seqs = %d: %.0f%% of the GPU has room for the states of %d sequences beside "
            "the weights, so no more run at once",
            scheduler.max_num_seqs,
            100 * cache.gpu_memory_utilization,
            fits,
        )
        scheduler.max_num_seqs = fits


def warn_of_slow_dtype(vllm_config: VllmConfig) -> None:
    """Say that a CPU without instructions for bfloat16 is faster in float32."""
    from vllm.platforms import current_platform

    model = vllm_config.model_config
    if (
        not current_platform.is_cpu()
        or model.dtype == torch.float32
        or model.quantization is not None
    ):
        return
    if cpu.preferred_dtype(model.hf_config.to_dict()) == "float32":
        logger.warning(
            "--dtype = %s: this CPU has no bfloat16 instructions (%s), so every product is made of "
            "conversions; --dtype float32 is several times faster ('lola-vllm serve' chooses it)",
            str(model.dtype).removeprefix("torch."),
            ", ".join(cpu.BFLOAT16_FLAGS),
        )


def announce_context_shift(vllm_config: VllmConfig) -> None:
    """Say that contexts have no end, and how many tokens a request may hold all the same.

    Raises:
        LolaConfigError: a `context_shift` that does not suit the model's length.
    """
    schedule = ShiftSchedule.of(lola_hf_config(vllm_config))
    if schedule is not None:
        logger.info(
            "LoLA: contexts without end: from %s tokens on, they shift by %s every %s tokens "
            "(context_shift). vLLM keeps the token ids of a request, at most %s "
            "(--max-model-len)",
            *(f"{n:,}" for n in (schedule.length, schedule.interval, schedule.interval)),
            f"{vllm_config.model_config.max_model_len:,}",
        )


def announce_compiling(vllm_config: VllmConfig) -> None:
    """A word before the longest part of a start, during which nothing is printed."""
    if not vllm_config.model_config.enforce_eager:
        logger.info(
            "torch.compile runs before the server answers: a minute or more without output at the "
            "first start, seconds at later ones; --enforce-eager starts without it, and decodes "
            "more slowly"
        )


def warn_of_cpu_adapters(vllm_config: VllmConfig) -> None:
    """Say what vLLM 0.32 on a CPU needs to keep adapters off requests for the base model."""
    from vllm.platforms import current_platform

    if vllm_config.lora_config is not None and current_platform.is_cpu():
        logger.warning(
            "--max-loras = %d: on a CPU, vLLM applies the adapter in its last slot to requests "
            "for the base model that share a batch with adapters; serve at most %d adapters",
            vllm_config.lora_config.max_loras,
            vllm_config.lora_config.max_loras - 1,
        )


def settle_cpu_worker(vllm_config: VllmConfig) -> None:
    """On a CPU take our worker, unless the user chose one."""
    from vllm.platforms import current_platform

    parallel = vllm_config.parallel_config
    if current_platform.is_cpu() and parallel.worker_cls == "auto":
        parallel.worker_cls = CPU_WORKER


def settle_worker_extension(vllm_config: VllmConfig) -> None:
    """Give the workers the methods that read states, unless the user extends them otherwise."""
    parallel = vllm_config.parallel_config
    if parallel.worker_extension_cls in ("", WORKER_EXTENSION):
        parallel.worker_extension_cls = WORKER_EXTENSION
    else:
        logger.warning(
            "--worker-extension-cls = %s: the routes under /v1/lola and the metrics lola:* cannot "
            "look at states; remove the option to have them",
            parallel.worker_extension_cls,
        )
