"""What vLLM may capture, and that a step that replays a graph finds its state_indices where it was
made."""

from types import SimpleNamespace

import pytest
import torch
from vllm.config import CUDAGraphMode
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import MambaSpec

from lola_vllm.core.config import config_class
from lola_vllm.core.lola_config import LolaConfig
from lola_vllm.core.ops import context_shift, portable
from lola_vllm.core.ops.shift_schedule import ShiftSchedule
from lola_vllm.engine.vllm.backend import GRAPHS_ENV, LolaMetadataBuilder
from tests.support.problem import make_problem, prefill

NULL = 0
STALE = 77  # what an earlier step left in a buffer


pytestmark = pytest.mark.usefixtures("fresh_choice")


def support(device_type):
    config = SimpleNamespace(
        device_config=SimpleNamespace(device_type=device_type),
        model_config=SimpleNamespace(dtype=torch.bfloat16),
    )
    return LolaMetadataBuilder.get_cudagraph_support(config, None)


@pytest.mark.parametrize(
    ("wanted", "device", "found"),
    [
        *(
            (wanted, device, "NEVER")
            for wanted in (None, "piecewise")
            for device in ("cuda", "cpu")
        ),
        ("full", "cuda", "UNIFORM_SINGLE_TOKEN_DECODE"),
    ],
)
def test_attention_stays_outside_of_graphs_unless_asked(monkeypatch, wanted, device, found):
    monkeypatch.delenv(GRAPHS_ENV, raising=False)
    if wanted:
        monkeypatch.setenv(GRAPHS_ENV, wanted)
    assert support(device) == AttentionCGSupport[found]


@pytest.mark.parametrize(
    ("wanted", "ops", "device", "words"),
    [
        ("yes", None, "cuda", "must be 'piecewise' or 'full'"),
        ("full", None, "cpu", "the back end cpp .* on cpu cannot be captured"),
        ("full", "torch", "cuda", "the back end torch on cuda cannot be captured"),
    ],
)
def test_what_cannot_be_captured_is_refused(monkeypatch, wanted, ops, device, words):
    monkeypatch.setenv(GRAPHS_ENV, wanted)
    if ops:
        monkeypatch.setenv("LOLA_VLLM_OPS", ops)
    with pytest.raises(ValueError, match=f"^{GRAPHS_ENV} = '{wanted}': {words}"):
        support(device)


def builder(mode, interval=0, state=None, drafts=0):
    layer = SimpleNamespace(state=state, ops=SimpleNamespace(shift=None))
    layer.sharing = [layer]
    hf_config = config_class("llama")(
        max_position_embeddings=64, lola_config={"context_shift": interval}
    )
    config = SimpleNamespace(
        model_config=SimpleNamespace(hf_config=hf_config),
        speculative_config=SimpleNamespace(num_speculative_tokens=drafts, parallel_drafting=False)
        if drafts
        else None,
        num_speculative_tokens=drafts,
        compilation_config=SimpleNamespace(
            cudagraph_mode=mode,
            max_cudagraph_capture_size=8,
            static_forward_context={"layer": layer},
        ),
        cache_config=SimpleNamespace(
            use_replayssm=False, replayssm_buffer_len=0, mamba_cache_mode="none"
        ),
        mamba_config=SimpleNamespace(backend=None),
        scheduler_config=SimpleNamespace(max_num_seqs=8),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
    )
    spec = MambaSpec(shapes=((64,),), dtypes=(torch.uint8,), block_size=64)
    made = LolaMetadataBuilder(spec, ["layer"], config, torch.device("cpu"))
    made.state_indices_tensor_d.fill_(STALE)
    return made


def step(state_indices, query_lens, context_lens, padded_to=None):
    """A step's rows as the runner hands them over; rows of no token behind them are padding."""
    padding = (padded_to or len(state_indices)) - len(state_indices)
    query_lens, context_lens = ([*x, *[0] * padding] for x in (query_lens, context_lens))
    starts = torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32)
    seq_lens = torch.tensor([q + c for q, c in zip(query_lens, context_lens, strict=True)])
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=seq_lens.to(torch.int32),
        seq_lens_cpu_upper_bound=seq_lens.to(torch.int32),
        num_reqs=len(query_lens),
        num_actual_tokens=padded_to or sum(query_lens),
        max_query_len=max(query_lens),
        max_seq_len=int(seq_lens.max()),
        block_table_tensor=torch.tensor([*state_indices, *[NULL] * padding], dtype=torch.int32)[
            :, None
        ],
        slot_mapping=torch.zeros(0, dtype=torch.int64),
        is_prefilling=torch.tensor(
            [c == 0 for c in context_lens[: len(state_indices)]] + [False] * padding
        ),
    )


def test_a_graphs_state_indices_stay_in_place_and_padding_has_none():
    b = builder(CUDAGraphMode.FULL_DECODE_ONLY)
    captured = b.build(0, step([NULL] * 4, [1] * 4, [1] * 4)).state_indices_tensor_d
    replayed = b.build(0, step([5, 3], [1, 1], [9, 700], padded_to=4))
    assert replayed.num_prefills == 0
    assert replayed.state_indices_tensor_d.data_ptr() == captured.data_ptr()
    assert captured[:, 0].tolist() == [5, 3, NULL, NULL]
    assert replayed.seq_lens.tolist() == [10, 701, 0, 0]


def test_a_new_prompt_of_one_token_takes_its_own_state_in_a_graph():
    """By its shape alone such a step replays a graph of decodes; with the former step's
    state_indices it
    would write into other sequences."""
    b = builder(CUDAGraphMode.FULL_DECODE_ONLY)
    captured = b.build(0, step([NULL] * 4, [1] * 4, [1] * 4)).state_indices_tensor_d
    b.build(0, step([5, 3], [1, 1], [9, 700], padded_to=4))
    replayed = b.build(0, step([3, 6], [1, 1], [701, 0], padded_to=4))
    assert (replayed.num_decodes, replayed.num_prefills) == (4, 0)
    assert captured[:, 0].tolist() == [3, 6, NULL, NULL]
    assert replayed.seq_lens.tolist() == [702, 1, 0, 0]


@pytest.mark.parametrize(
    ("mode", "drafts", "query_lens"),
    [
        (CUDAGraphMode.NONE, 0, [1, 1, 1, 1]),
        (CUDAGraphMode.FULL_DECODE_ONLY, 0, [1, 1, 1, 1]),
        (CUDAGraphMode.NONE, 2, [3, 1, 2, 1]),
    ],
    ids=["plain", "graph", "drafts"],
)
def test_decodes_that_are_due_are_shifted_before_their_known_token(mode, drafts, query_lens):
    """Once, and no other page: not before, not at other counts, not that of padding."""
    config = LolaConfig(window_size=8, sparse_cache_size=5, update_interval=4)
    problem = make_problem(80, config, schedule=ShiftSchedule(64, 16))
    state = problem.state(num_pages=8)
    rows, counts = [5, 3, 4, 6], [64, 65, 63, 80]
    for state_index, count in zip(rows, counts, strict=True):
        prefill(portable, problem, state, 0, count, state_index)
    before, expected = state.pages.clone(), state.pages.clone()
    other = problem.bind(expected)
    for state_index, count in ((5, 64), (6, 80)):
        context_shift.shift_layers([other], torch.tensor([state_index]), torch.tensor([count]))
    b = builder(mode, 16, state, drafts)
    if not drafts:
        b.build(0, step([NULL] * 4, [1] * 4, [64] * 4))  # as a capture has it
        assert torch.equal(state.pages, before)
    m = b.build(0, step(rows, query_lens, counts, padded_to=None if drafts else 6))
    assert m.num_prefills == 0
    assert torch.equal(state.pages, expected)
    assert (state.pages != before).any(1).nonzero().squeeze(1).tolist() == [5, 6]


@pytest.mark.parametrize("mode", [CUDAGraphMode.NONE, CUDAGraphMode.FULL_DECODE_ONLY])
def test_longer_prompts_are_prefilled(mode):
    m = builder(mode).build(0, step([3, 6], [1, 5], [701, 0]))
    assert (m.num_decodes, m.num_prefills, m.num_prefill_tokens) == (1, 1, 5)
    assert m.state_indices_tensor_d[:, 0].tolist() == [3]
    assert m.state_indices_tensor_p.tolist() == [6]
    assert m.query_start_loc_p_cpu.tolist() == [0, 5] and m.context_lens_p_cpu.tolist() == [0]


def test_without_graphs_a_prompt_of_one_token_is_prefilled():
    m = builder(CUDAGraphMode.NONE).build(0, step([3, 6], [1, 1], [701, 0]))
    assert (m.num_decodes, m.num_prefills) == (1, 1)


def test_drafts_are_decoded_one_behind_the_other():
    b = builder(CUDAGraphMode.NONE, drafts=3)
    m = b.build(0, step([3, 6, 5, 7], [1, 4, 2, 9], [701, 30, 9, 0]))
    assert (m.num_decodes, m.num_prefills, m.num_prefill_tokens) == (3, 1, 9)
    found = [(tokens, *map(torch.Tensor.tolist, batch)) for tokens, batch in m.decode_rounds]
    assert found[0][0].tolist() == [0, 1, 5] and found[0][1:] == ([3, 6, 5], [702, 31, 10])
    assert found[1][0].tolist() == [2, 6] and found[1][1:] == ([6, 5], [32, 11])
    assert found[2:] == [(slice(3, 4), [6], [33]), (slice(4, 5), [6], [34])]
    assert m.prefill_batch.query_start_loc.tolist() == [0, 9]
    assert m.prefill_batch.context_lens.tolist() == [0]
    without = b.build(0, step([3, 6], [1, 1], [701, 30]))
    assert without.query_start_loc_d_cpu is None and without.num_decodes == 2
