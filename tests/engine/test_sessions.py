"""Stored states in the engine: what is restored, and that nothing it changes is an answer."""

import threading

import pytest
from vllm import SamplingParams, TokensPrompt

from tests.support.engine import (
    GREEDY,
    ask,
    block_pool,
    engine,
    scheduler,
    state_manager,
    store_options,
)
from tools.support.tiny import make_tiny, random_prompts

LOLA = {"window_size": 16, "sparse_cache_size": 24, "sink_size": 2}
NEW = 12
BASE = {"max_num_batched_tokens": 64, "max_num_seqs": 8}
CACHED = {**BASE, "enable_prefix_caching": True, "block_size": 32, "max_num_batched_tokens": 128}


@pytest.fixture(scope="module")
def cold(tiny):
    """Answers of an engine without a store."""
    answers = {}

    def answer(prompt, new=NEW):
        return answers[tuple(prompt), new]

    (text, tail, other) = random_prompts([203, 31, 9], seed=4)
    with engine(tiny, **BASE) as llm:
        first = ask(llm, text)[0]
        for prompt in (text, text + first + tail, text + first + other, text + tail):
            answers[tuple(prompt), NEW] = ask(llm, prompt)[0]
    answer.text, answer.tail, answer.other, answer.first = text, tail, other, first
    return answer


@pytest.mark.parametrize("options", [BASE, CACHED], ids=["plain", "prefix-caching"])
def test_a_new_process_goes_on_where_the_old_one_stopped(tiny, cold, tmp_path, options):
    with engine(tiny, **options, **store_options(tmp_path)) as llm:
        tokens, told = ask(llm, cold.text)
        assert tokens == cold(cold.text)
        assert told["tokens"] == len(cold.text) + NEW - 1 and told["restored_tokens"] == 0
        assert "no stored state" in told["reason"]
    whole = cold.text + cold.first
    with engine(tiny, **options, **store_options(tmp_path)) as llm:
        for tail, n in ((cold.tail, len(whole) - 1), (cold.other, len(whole) - 1)):
            tokens, told = ask(llm, whole + tail)
            assert tokens == cold(whole + tail)
            assert told["restored_tokens"] == n and told["reason"] is None
        # The end of the prompt is a state of its own: the answer may be left out, or said anew.
        tokens, told = ask(llm, cold.text + cold.tail)
        assert tokens == cold(cold.text + cold.tail)
        assert told["restored_tokens"] == len(cold.text)


def told_of(llm, prompt, **lola):
    return ask(llm, prompt, **lola)[1]


def test_names_forks_salts_and_what_is_said(tiny, cold):
    whole = cold.text + cold.first
    with engine(tiny, **BASE, **store_options()) as llm:
        told = told_of(llm, cold.text, save="agent-7")
        assert (told["session"], told["turn"], told["restored_tokens"]) == ("agent-7", 1, 0)
        assert told["bytes"] == state_manager(llm).spec.page_size_bytes + 4 * told["tokens"]
        tokens, told = ask(llm, whole + cold.tail, from_="agent-7", save="agent-7")
        assert tokens == cold(whole + cold.tail)
        assert (told["turn"], told["restored_tokens"], told["reason"]) == (2, len(whole) - 1, None)
        # A turn that is no longer the last, from which another conversation goes on.
        tokens, told = ask(llm, whole + cold.other, from_="agent-7@1", save="agent-8")
        assert tokens == cold(whole + cold.other)
        assert (told["session"], told["turn"]) == ("agent-8", 1)
        assert told["restored_tokens"] == len(whole) - 1
        # What is asked for by a name that does not fit is found by its tokens all the same.
        for found, salt, lola, words in (
            (True, None, {"from_": "agent-9"}, "nothing is stored under 'agent-9'"),
            (True, None, {}, ""),
            (False, None, {"from_": False}, "not asked for"),
            (False, None, {"save": "a/b"}, "kv_transfer_params.lola.save = 'a/b'"),
            (False, "alice", {"save": False}, "no stored state"),
            (False, "alice", {"from_": "agent-7"}, "nothing is stored under 'agent-7'"),
        ):
            tokens, told = ask(llm, whole + cold.other, salt=salt, **lola)
            assert tokens == cold(whole + cold.other), lola
            assert told["restored_tokens"] == found * (len(whole) - 1), (lola, told)
            assert words in (told["reason"] or "") and bool(words) == bool(told["reason"]), told
        assert told_of(llm, cold.text[:9], save=False)["unsaved"] == "not asked for"
        assert "computed again sooner" in told_of(llm, cold.text[:9])["unsaved"]


def manage(llm, method, **arguments):
    core = llm.llm_engine.engine_core.engine_core
    return core.lola_sessions(method, arguments)


def half(llm):
    return scheduler(llm).connector.scheduling


def worker(llm):
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return get_kv_transfer_group().transfer


def test_many_sessions_leave_nothing_behind(tiny, tmp_path):
    """More sessions than the budgets hold, more requests than blocks: nothing of them stays."""
    prompts = random_prompts([70 + i % 7 for i in range(60)], seed=7)
    state = 34816
    options = store_options(tmp_path, ram=str(10 * state), state_disk=str(20 * state))
    with engine(tiny, **BASE, num_gpu_blocks_override=6, **options) as llm:
        params = SamplingParams(max_tokens=4, **GREEDY)
        requests = [TokensPrompt(prompt_token_ids=p) for p in prompts]
        for _ in range(2):
            outputs = llm.generate(requests, params, use_tqdm=False)
            assert len(outputs) == 60
        llm.generate(requests[:1], params, use_tqdm=False)
        store = half(llm).store
        assert store.memory.nbytes <= 10 * state and store.disk.nbytes <= 20 * state
        assert store.counts["evicted-memory"] > 50 and not store.failures
        assert not half(llm).request_states and not half(llm)._prompts and not half(llm)._queues
        manage(llm, "clear")
        llm.llm_engine.engine_core.engine_core.step()
        worker(llm)._writer.submit(int).result()
        assert state_manager(llm).num_states_in_use == 0
        assert block_pool(llm).get_num_free_blocks() == 5
        assert worker(llm).num_states == worker(llm).num_waiting == 0
        assert not list(tmp_path.rglob("*.safetensors"))
        assert not scheduler(llm).requests


@pytest.mark.parametrize("options", [BASE, CACHED], ids=["plain", "prefix-caching"])
def test_restored_requests_are_preempted_and_answer_the_same(tiny, options):
    """More sequences than blocks; each is restored, thrown out, and restored again."""
    texts = random_prompts([100 + 10 * i for i in range(6)], seed=11)
    with engine(tiny, **BASE) as llm:
        first = [ask(llm, text)[0] for text in texts]
        whole = [text + answer + [7, 8] for text, answer in zip(texts, first, strict=True)]
        expected = [ask(llm, text, new=80)[0] for text in whole]
    blocks = 7 if options is CACHED else 4
    with engine(tiny, **options, num_gpu_blocks_override=blocks, **store_options()) as llm:
        assert [ask(llm, text)[0] for text in texts] == first
        params = SamplingParams(max_tokens=80, **GREEDY)
        requests = [TokensPrompt(prompt_token_ids=p) for p in whole]
        outputs = llm.generate(requests, params, use_tqdm=False)
        assert [list(o.outputs[0].token_ids) for o in outputs] == expected
        for text, output in zip(whole, outputs, strict=True):
            told = output.kv_transfer_params["lola"]
            # What was kept of it before it was preempted may reach further.
            assert told["restored_tokens"] >= len(text) - 3 or told["reason"]
        assert half(llm).store.counts["hits"] >= 4


def run(core, done=lambda: False):
    """Steps until nothing runs."""
    outputs = {}
    while core.has_unfinished_requests() and not done():
        for output in core.step():
            outputs[output.request_id] = output
    return outputs


def add(core, name, prompt, new=NEW, **lola):
    extra = {"kv_transfer_params": {"lola": lola}}
    params = SamplingParams(max_tokens=new, extra_args=extra, **GREEDY)
    core.add_request(name, TokensPrompt(prompt_token_ids=prompt), params)


def test_two_requests_of_a_session_take_turns(tiny, cold):
    whole = cold.text + cold.first
    with engine(tiny, **BASE, **store_options()) as llm:
        core = llm.llm_engine
        add(core, "first", cold.text, save="s")
        add(core, "second", whole + cold.tail, save="s")
        add(core, "free", cold.text + cold.tail)
        outputs = run(core)
        assert list(outputs["second"].outputs[0].token_ids) == cold(whole + cold.tail)
        told = {name: o.kv_transfer_params["lola"] for name, o in outputs.items()}
        assert told["second"]["restored_tokens"] == len(whole) - 1
        assert (told["first"]["turn"], told["second"]["turn"]) == (1, 2)
        add(core, "third", cold.text, new=200, save="s")
        add(core, "fourth", whole + cold.other, save="s")
        for _ in range(5):
            core.step()
        core.abort_request(["third"])
        outputs = run(core)
        assert list(outputs["fourth"].outputs[0].token_ids) == cold(whole + cold.other)


def test_aborts_while_a_state_is_loaded_or_saved(tiny, cold, tmp_path, monkeypatch):
    """A disk that answers when it is told to."""
    from lola_vllm.memory.sessions import transfer

    gate = threading.Event()
    read = transfer.read_state
    whole = cold.text + cold.first
    with engine(tiny, **BASE, **store_options(tmp_path, ram="0")) as llm:
        ask(llm, cold.text)
        ask(llm, [1, 2, 3])
        worker(llm)._writer.submit(int).result()

        def late(*args, **kwargs):
            gate.wait(20)
            return read(*args, **kwargs)

        monkeypatch.setattr(transfer, "read_state", late)
        core = llm.llm_engine
        add(core, "gone", whole + cold.tail)
        for _ in range(3):
            core.step()
        core.abort_request(["gone"])
        add(core, "stays", whole + cold.tail)
        add(core, "other", [1, 2, 3, 4])
        for _ in range(20):
            core.step()
        gate.set()
        outputs = run(core)
        assert list(outputs["stays"].outputs[0].token_ids) == cold(whole + cold.tail)
        assert outputs["stays"].kv_transfer_params["lola"]["restored_tokens"] == len(whole) - 1
        add(core, "ends", cold.text)
        core.step()
        core.abort_request(["ends"])
        ask(llm, [1, 2, 3])
        llm.llm_engine.engine_core.engine_core.step()
        assert state_manager(llm).num_states_in_use == 0
        assert not scheduler(llm).requests


@pytest.mark.parametrize("damage", ["flip", "vanish"])
def test_a_state_that_cannot_be_read_is_computed_again(tiny, cold, tmp_path, damage):
    whole = cold.text + cold.first
    with engine(tiny, **BASE, **store_options(tmp_path, ram="0")) as llm:
        ask(llm, cold.text)
    with engine(tiny, **BASE, **store_options(tmp_path, ram="0")) as llm:
        for path in tmp_path.rglob("*.safetensors"):
            data = bytearray(path.read_bytes())
            data[-100] ^= damage == "flip"
            path.write_bytes(data)
        if damage == "vanish":
            half(llm).store.directory.path.rename(tmp_path / "elsewhere")
        tokens, told = ask(llm, whole + cold.tail)
        assert tokens == cold(whole + cold.tail)
        assert told["restored_tokens"] == 0 and "could not be used" in told["reason"]
        assert sum(half(llm).store.failures.values()) >= 1
        assert ask(llm, whole + cold.tail)[0] == cold(whole + cold.tail)


def test_each_rank_stores_its_part(tiny, cold, tmp_path):
    whole = cold.text + cold.first
    for known in (whole, whole + cold.tail):  # the second time the same text comes again
        with engine(tiny, **BASE, tensor_parallel_size=2, **store_options(tmp_path)) as llm:
            ask(llm, cold.text)
            tokens, told = ask(llm, whole + cold.tail)
            assert tokens == cold(whole + cold.tail)
            assert told["restored_tokens"] == len(known) - 1
    names = [path.name.split(".")[1] for path in tmp_path.rglob("*.safetensors")]
    assert set(names) == {"0of2", "1of2"} and names.count("0of2") == names.count("1of2")


def test_another_connector_beside_the_store_is_refused(tiny):
    from vllm.config import KVTransferConfig

    other = KVTransferConfig(kv_connector="OffloadingConnector", kv_role="kv_both")
    with (
        pytest.raises(Exception, match="in the place of LoLA's own connector"),
        engine(tiny, kv_transfer_config=other, **store_options()),
    ):
        pass
    with (
        pytest.raises(Exception, match="--pipeline-parallel-size is 2"),
        engine(tiny, pipeline_parallel_size=2, enforce_eager=False, **store_options()),
    ):
        pass
    for lola, words in (({"state_rma": 1}, "state_rma"), (3, "must be an object")):
        with (
            pytest.raises(Exception, match=words),
            engine(tiny, additional_config={"lola": lola}),
        ):
            pass


def hf_tokens(model, ids, cache, new):
    """Greedy tokens after `ids`, the columns that the cache has not seen."""
    found = []
    for _ in range(new):
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
        ids = logits[:, -1:].argmax(-1)
        found.append(int(ids))
    return found


def test_transformers_and_the_server_read_each_others_files(tiny, cold, tmp_path):
    import torch
    from transformers import AutoConfig

    from lola_vllm.engine.hf import LolaCache, LolaForCausalLM
    from lola_vllm.memory.sessions.file import StateFileError

    model = LolaForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    whole = cold.text + cold.first
    with engine(tiny, **BASE, **store_options(tmp_path)) as llm, torch.no_grad():
        ask(llm, cold.text, save="here")
        ask(llm, [1, 2, 3])
        worker(llm)._writer.submit(int).result()
        (path,) = manage(llm, "files", reference="here")["files"]
        cache, tokens = LolaCache.load(path, model.config)
        assert tokens.tolist() == whole[:-1]
        rest = torch.tensor([whole[len(tokens) :] + cold.tail])
        assert hf_tokens(model, rest, cache, NEW) == cold(whole + cold.tail)

        cache = LolaCache(model.config)
        model(input_ids=torch.tensor([cold.text[:150], cold.text[1:151]]), past_key_values=cache)
        with pytest.raises(ValueError, match="tokens: 149, but row 0 has seen 150"):
            cache.save(tmp_path / "x", cold.text[:149])
        cache.save(tmp_path / "state", cold.text[:150])
        cache.save(tmp_path / "second", cold.text[1:151], row=1)
        manage(llm, "clear")
        for name, start in (("state", 0), ("second", 1)):
            brought = manage(llm, "import_file", file=str(tmp_path / name), session=name)
            assert brought.get("tokens") == 150, brought
            tokens, told = ask(llm, cold.text[start:], from_=name)
            assert told["restored_tokens"] == 150
            assert start or tokens == cold(cold.text)
    other = AutoConfig.from_pretrained(tiny, lola_config={"window_size": 12})
    with pytest.raises(StateFileError, match="another model config"):
        LolaCache.load(tmp_path / "state", other)


@pytest.mark.parametrize(
    ("options", "ahead"), [(BASE, True), (CACHED, False)], ids=["scheduled-ahead", "prefix-caching"]
)
def test_an_answer_that_stops_by_itself_is_stored_as_it_was_said(tiny, cold, options, ahead):
    """With scheduling ahead, one more step has run when the engine learns of the stop: the state
    then has the last token too, and says so."""
    stop = cold.first[6]
    n = cold.first.index(stop) + 1
    params = SamplingParams(max_tokens=NEW, temperature=0.0, stop_token_ids=[stop])
    with engine(tiny, **options, async_scheduling=ahead, **store_options()) as llm:
        request = TokensPrompt(prompt_token_ids=cold.text)
        (output,) = llm.generate([request], params, use_tqdm=False)
        said = list(output.outputs[0].token_ids)
        assert said == cold.first[:n]
        covered = output.kv_transfer_params["lola"]["tokens"]
        assert covered - len(cold.text) in (n - 1, n)
        whole = cold.text + cold.first
        tokens, told = ask(llm, whole + cold.tail)
        assert tokens == cold(whole + cold.tail)
        assert told["restored_tokens"] == covered


@pytest.mark.parametrize(
    ("interval", "length"), [(16, 608), (1, 600)], ids=["updates-every-16", "updates-each-token"]
)
def test_the_same_long_prompt_and_one_that_ends_otherwise_go_on(tmp_path, interval, length):
    model = make_tiny(tmp_path / "tiny", {**LOLA, "update_interval": interval})
    (text, other, beside) = random_prompts([length, 40, 290], seed=7)
    edited = text[:-30] + other
    with engine(model, **BASE, max_model_len=1024) as llm:
        cold = [ask(llm, prompt)[0] for prompt in (text, edited)]
    # Steps of 64 tokens, so that waypoints lie inside of them, and one prompt beside another.
    with engine(model, **BASE, max_model_len=1024, **store_options(store="named")) as llm:
        extra = {"kv_transfer_params": {"lola": {}}}
        params = SamplingParams(max_tokens=NEW, extra_args=extra, **GREEDY)
        both = [TokensPrompt(prompt_token_ids=prompt) for prompt in (text, beside)]
        first = llm.generate(both, params, use_tqdm=False)[0]
        assert list(first.outputs[0].token_ids) == cold[0]
        for prompt, expected, least in ((text, cold[0], length - 1), (edited, cold[1], 560)):
            tokens, told = ask(llm, prompt)
            assert tokens == expected
            assert told["restored_tokens"] >= least, told
        # They go with the conversation, as what they hold was said there.
        assert manage(llm, "stats")["states"] > 3
        for session in manage(llm, "sessions"):
            if session["session"].startswith("auto-"):
                manage(llm, "delete", reference=session["session"])
        assert manage(llm, "stats")["states"] == 0
