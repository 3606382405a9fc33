"""Options that do not know LoLA's state are refused at start-up; what the others come to."""

from types import SimpleNamespace

import pytest
from vllm import SamplingParams, TokensPrompt
from vllm.engine.arg_utils import EngineArgs

from lola_vllm.core.config import TensorFacts, config_class
from lola_vllm.core.sizing import GIB, GPU_BYTES, RANK_BYTES, SERVER_BYTES
from lola_vllm.engine.vllm import config_hook
from lola_vllm.engine.vllm.cache import describe_pool
from lola_vllm.engine.vllm.refusals import UnsupportedOptionError, check_parallel_heads
from lola_vllm.models.init import init_checkpoint
from tests.support.drafts import NGRAM
from tests.support.engine import GREEDY, engine, pages, state_manager
from tests.support.families import make_base
from tools.support.tiny import random_prompts

LOLA = {"window_size": 8, "sparse_cache_size": 4}
# A step of eight sequences has room for a block of a late prompt from 32 + 7 tokens on.
CACHED = {"enable_prefix_caching": True, "block_size": 32, "max_num_seqs": 8}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"speculative_config": NGRAM, "hf_overrides": {"lola_config": {"update_interval": 1}}},
            "--speculative-config = 'ngram' cannot be used with a LoLA model: with an "
            "update_interval of 1",
        ),
        ({"speculative_config": {**NGRAM, "method": "ngram_gpu"}},
         "--speculative-config = 'ngram_gpu'"),
        ({"speculative_config": NGRAM, "scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"},
         "--scheduler-cls = 'vllm.v1.core.sched.scheduler.Scheduler'"),
        ({"speculative_config": NGRAM, "async_scheduling": True}, "--async-scheduling = True"),
        ({"speculative_config": NGRAM, "worker_cls": "vllm.v1.worker.cpu_worker.CPUWorker"},
         "--worker-cls = 'vllm.v1.worker.cpu_worker.CPUWorker'"),
        ({"kv_cache_dtype": "fp8"}, "--kv-cache-dtype = 'fp8'"),
        (
            {"kv_transfer_config": {"kv_connector": "OffloadingConnector", "kv_role": "kv_both"}},
            "--kv-transfer-config = 'OffloadingConnector'",
        ),
        ({"kv_offloading_size": 1.0}, "--kv-offloading-size = 1.0"),
        ({"enable_dbo": True}, "--enable-dbo = True"),
        ({"decode_context_parallel_size": 2, "tensor_parallel_size": 2},
         "--decode-context-parallel-size = 2"),
        ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size = 2"),
        ({"tensor_parallel_size": 3}, "--tensor-parallel-size = 3"),
        ({"enable_sleep_mode": True}, "Sleep mode is not supported on current platform"),
        ({"hf_overrides": {"lola_config": {"windw_size": 4}}}, "nearest valid name: 'window_size'"),
        (CACHED | {"max_num_batched_tokens": 32}, "--max-num-batched-tokens = 32"),
        (CACHED | {"max_num_scheduled_tokens": 36}, "--max-num-scheduled-tokens = 36"),
        (CACHED | {"max_num_batched_tokens": 80, "speculative_config": NGRAM},
         "--max-num-batched-tokens = 80"),
    ],
    ids=["drafts-beside-updates", "drafts-on-a-gpu", "drafts-scheduler", "drafts-ahead",
         "drafts-worker", "fp8-cache", "connector", "offloading", "two-batches", "context-parallel",
         "eager-stages", "heads", "sleep", "unknown-key", "batched-tokens", "scheduled-tokens",
         "batched-tokens-of-drafts"],
)  # fmt: skip
def test_refused_with_a_reason(tiny, options, words, capfd):
    with pytest.raises(Exception) as error, engine(tiny, **options):
        pass
    assert words in str(error.value) + capfd.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        {"max_num_scheduled_tokens": 39},
        {"max_num_batched_tokens": 39},
        # No piece is as long as a block, so pieces may end anywhere.
        {"max_num_scheduled_tokens": 36, "long_prefill_token_threshold": 16},
    ],
    ids=["scheduled", "batched", "short-pieces"],
)
def test_a_late_prompt_does_not_wait_for_the_others_to_end(tiny, options):
    *early, late = random_prompts([5] * 7 + [100])
    with engine(tiny, **CACHED, **options) as llm:
        for i, prompt in enumerate(early):
            params = SamplingParams(max_tokens=60, **GREEDY)
            llm.llm_engine.add_request(str(i), TokensPrompt(prompt_token_ids=prompt), params)
        for _ in range(6):
            llm.llm_engine.step()
        params = SamplingParams(max_tokens=1, **GREEDY)
        llm.llm_engine.add_request("late", TokensPrompt(prompt_token_ids=late), params)
        finished = []
        while "late" not in finished:
            finished += [o.request_id for o in llm.llm_engine.step() if o.finished]
        assert finished == ["late"]


def config_of(model, **options):
    """What vLLM would start with, without starting it."""
    return EngineArgs(str(model), skip_tokenizer_init=True, **options).create_engine_config()


def test_drafts_beside_sliding_layers_are_refused(tmp_path):
    make_base(tmp_path / "base", "olmo3")
    init_checkpoint(tmp_path / "base", tmp_path / "lola", LOLA)
    with pytest.raises(ValueError, match=r"'ngram' cannot be used .*: the ring of a sliding layer"):
        config_of(tmp_path / "lola", speculative_config=NGRAM)


@pytest.mark.parametrize("ranks", [1, 2])
def test_on_a_cpu_the_ranks_share_half_of_the_free_memory(tiny, monkeypatch, ranks):
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    options = {"tensor_parallel_size": ranks, "dtype": "float32", "max_num_seqs": 64}

    def pool(free):
        memory = SimpleNamespace(virtual_memory=lambda: SimpleNamespace(available=free))
        monkeypatch.setattr(config_hook, "psutil", memory)
        return config_of(tiny, **options).cache_config.kv_cache_memory_bytes

    plenty = pool(100 * GIB)
    state = plenty // (3 * 64 + 1)
    assert plenty == (3 * 64 + 1) * state
    weights = (tiny / "model.safetensors").stat().st_size
    needed = weights + SERVER_BYTES + (ranks - 1) * RANK_BYTES
    assert pool(needed + 200 * state * ranks) == 100 * state
    assert pool(0) == 4 * state  # one sequence; vLLM says what is missing


def test_stored_states_take_a_share_of_the_room(tiny, monkeypatch):
    """64 of them where no number is given, fewer in little memory, none without room for two."""

    def stored(free, **options):
        memory = SimpleNamespace(virtual_memory=lambda: SimpleNamespace(available=free))
        monkeypatch.setattr(config_hook, "psutil", memory)
        store = {"lola": {"state_ram": "auto"}}
        transfer = config_of(
            tiny, dtype="float32", additional_config=store, **options
        ).kv_transfer_config
        found = transfer and transfer.kv_connector_extra_config["state_ram"]
        assert store["lola"]["state_ram"] == (found or 0)  # for API processes that start later
        return found

    state = stored(100 * GIB) // 64
    needed = (tiny / "model.safetensors").stat().st_size + SERVER_BYTES
    assert stored(needed + 2 * 40 * state) == 10 * state
    assert stored(needed + 2 * 7 * state) is None
    assert stored(100 * GIB, pipeline_parallel_size=2, enforce_eager=False) is None
    assert stored(100 * GIB, tensor_parallel_size=2) > 64 * state


def test_on_a_gpu_no_more_sequences_run_than_have_room(tiny, monkeypatch):
    config = config_of(tiny, dtype="float32", max_num_seqs=256, enable_prefix_caching=False)
    state = config.cache_config.kv_cache_memory_bytes // 257
    config.cache_config.kv_cache_memory_bytes = None
    config.cache_config.gpu_memory_utilization = 1.0
    weights = (tiny / "model.safetensors").stat().st_size
    for room, sequences in ((2000, 256), (101, 100), (0, 100)):  # vLLM says what is missing
        memory = weights + GPU_BYTES + room * state
        platform = SimpleNamespace(is_cuda=lambda: True, get_device_total_memory=lambda m=memory: m)
        monkeypatch.setattr("vllm.platforms.current_platform", platform)
        config_hook.settle_gpu_sequences(config)
        assert config.scheduler_config.max_num_seqs == sequences


def test_a_cpu_without_bfloat16_is_warned_of(tiny, monkeypatch):
    monkeypatch.setenv("LOLA_VLLM_CPU_ISA", "avx2")
    said = []
    monkeypatch.setattr(config_hook.logger, "warning", lambda text, *args: said.append(text % args))
    config_of(tiny, dtype="float32")
    assert said == []
    config_of(tiny, dtype="bfloat16")
    (message,) = said
    assert "--dtype = bfloat16" in message and "--dtype float32" in message


def test_the_printed_memory_is_true(tiny):
    """Bytes by hand, against the page, the pool that vLLM allocated and the start-up line."""
    with engine(tiny, kv_cache_memory_bytes=2**20) as llm:
        spec, states = state_manager(llm).spec, state_manager(llm).num_states
        Hs, Hkv, F2, d, f32 = 2, 2, 16, 16, 4
        parts = [
            Hs * F2 * d * f32, Hs * F2 * f32, Hs * 4 * 4,
            Hs * 4 * d * f32, Hs * 4 * d * f32, Hkv * 16 * d * f32, Hkv * 16 * d * f32,
        ]  # fmt: skip
        by_hand = sum(-(-p // 64) * 64 for p in parts)
        page = spec.page_size_bytes // 2  # of each of the two layers
        assert by_hand <= page < by_hand + 256
        layer_pages = pages(llm)
        assert sum(p.numel() for p in layer_pages) <= 2**20
        assert all(p.shape == (states + 1, page) for p in layer_pages)
        line = describe_pool(spec, states)
        assert f"{2 * page / 2**20:.2f} MiB per sequence" in line
        assert f"{states} sequences fit" in line
        # A full cache of this model: 2 layers x (K + V) x 2 heads x 16 x 4 bytes = 512 per token.
        assert f"beyond {-(-2 * page // 512):,} tokens" in line


@pytest.mark.parametrize(
    ("heads", "kv_heads", "state_heads", "tp_size", "ok"),
    [
        (9, 3, 3, 1, True),
        (9, 3, 3, 3, True),
        (9, 3, 9, 3, True),
        (9, 3, 3, 2, False),
        (32, 8, 8, 16, True),
        (32, 8, 32, 16, True),
        (12, 2, 6, 4, False),
        (8, 2, 2, 16, False),
    ],
)
def test_heads_must_divide_among_the_ranks(heads, kv_heads, state_heads, tp_size, ok):
    config = config_class("llama")(
        hidden_size=16 * heads, num_attention_heads=heads, num_key_value_heads=kv_heads
    )  # fmt: skip
    config.facts = TensorFacts(16, state_heads)
    if ok:
        check_parallel_heads(config, tp_size)
    else:
        with pytest.raises(UnsupportedOptionError, match=f"{state_heads} state heads"):
            check_parallel_heads(config, tp_size)
