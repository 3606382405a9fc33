"""What `lola-vllm serve` chooses, that the user's options win, and what it refuses."""

import json
import os
import subprocess
import sys

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from lola_vllm.command import cli
from lola_vllm.core.sizing import RANK_BYTES, SERVER_BYTES
from lola_vllm.engine.estimate import GIB, estimate
from lola_vllm.serving import launch, store_options
from lola_vllm.serving.launch import Machine, plan

STORED = 64 * 78336  # states of the model below
CPU = Machine("cpu", 2, 16 * GIB)
AVX2 = {"LOLA_VLLM_CPU_ISA": "avx2"}  # a CPU without bfloat16 instructions
GPU = Machine("cuda", 16, 80 * GIB)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A state of this costs 16 KiB per layer and more; weights are next to nothing."""
    folder = tmp_path_factory.mktemp("launch")
    config = LlamaConfig(
        vocab_size=16, hidden_size=64, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=8192,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    cli.main(["init", "--base", str(folder / "base"), "--out", str(folder / "lola")])
    return folder / "lola"


@pytest.fixture(autouse=True)
def cpu_with_bfloat16(monkeypatch):
    """The machine of these tests has bfloat16 instructions, whatever this one has."""
    monkeypatch.setattr(launch.cpu, "_flags", lambda: frozenset({"avx2", "avx512_bf16"}))


def chosen(model, *options, machine=CPU, env=None):
    launched = plan(str(model), options, machine, env or {})
    return {choice.name: choice.value for choice in (*launched.options, *launched.env)}


def state_bytes(model, dtype="bfloat16", **lola):
    row = next(row for row in estimate(model, lola, dtype=dtype).rows if row.chosen)
    return row.bytes_per_sequence


def test_on_a_cpu(model):
    found = chosen(model)
    assert found["--max-num-seqs"] == "64"  # 32 per core
    assert int(found["--kv-cache-memory-bytes"]) == (64 + 1) * state_bytes(model)
    assert found["OMP_WAIT_POLICY"] == "PASSIVE"
    assert found["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert found["VLLM_PLUGINS"].split(",")[0] == "lola"


def test_on_a_gpu_vllm_sizes_the_pool(model):
    found = chosen(model, machine=GPU)
    assert found["--max-num-seqs"] == "256"
    assert "--kv-cache-memory-bytes" not in found
    assert "OMP_WAIT_POLICY" not in found and "VLLM_PLUGINS" in found


# What says that prefix caching is wanted, or leaves no store to take its place.
CACHING = (
    ["--enable-prefix-caching"], ["--block-size", "64"], ["--lola-state-ram", "0"],
    ["--lola-store", "none"],
    ["--kv-events-config", "{}"], ["--data-parallel-size", "2"], ["--pipeline-parallel-size", "2"],
)  # fmt: skip


def test_the_store_takes_the_place_of_prefix_caching(model):
    found = chosen(model)
    assert found["--no-enable-prefix-caching"] == "" and "--block-size" not in found
    assert "--no-enable-prefix-caching" in chosen(model, "--lola-state-dir", "/x")


@pytest.mark.parametrize("given", CACHING, ids=lambda given: given[0])
def test_prefix_caching_stays_where_it_is_wanted_or_alone(model, given):
    found = chosen(model, *given)
    assert "--no-enable-prefix-caching" not in found
    if given[0] != "--block-size":
        even = estimate(model).rows[0].sequence.break_even_tokens()
        assert int(found["--block-size"]) >= even > int(found["--block-size"]) // 2


def test_memory_bounds_the_sequences(model):
    state = state_bytes(model)
    weights = (model / "model.safetensors").stat().st_size // 2  # float32, served as bfloat16
    # Half of what is left holds ten sequences of three states, the null block, and a bit.
    memory = SERVER_BYTES + weights + 2 * (31 * state + state // 2)
    machine = Machine("cpu", 8, memory)
    found = chosen(model, "--enable-prefix-caching", machine=machine)
    assert found["--max-num-seqs"] == "10"
    assert int(found["--kv-cache-memory-bytes"]) == 31 * state
    assert chosen(model, machine=machine)["--max-num-seqs"] == "30"
    assert chosen(model, "--no-enable-prefix-caching", machine=machine)["--max-num-seqs"] == "30"


@pytest.mark.parametrize("given", [["--max-num-seqs", "7"], ["--max_num_seqs=7"]])
def test_the_users_sequences_size_the_pool(model, given):
    found = chosen(model, *given)
    assert "--max-num-seqs" not in found
    assert int(found["--kv-cache-memory-bytes"]) == (7 + 1) * state_bytes(model)


def test_the_users_pool_bounds_the_sequences(model):
    pool = (5 + 1) * state_bytes(model)
    found = chosen(model, "--kv-cache-memory-bytes", str(pool))
    assert found["--max-num-seqs"] == "5" and "--kv-cache-memory-bytes" not in found
    found = chosen(model, env={"VLLM_CPU_KVCACHE_SPACE": "1"})
    assert found["--max-num-seqs"] == "64" and "--kv-cache-memory-bytes" not in found


def test_the_users_environment_wins(model):
    env = {"VLLM_PLUGINS": "a,lola", "OMP_WAIT_POLICY": "ACTIVE",
           "VLLM_CPU_OMP_THREADS_BIND": "0-1"}  # fmt: skip
    assert not set(env) & set(chosen(model, env=env))


def test_the_users_options_come_last_and_whole(model):
    options = ["--port", "80", "--block-size", "32", "-tp", "1"]
    command = plan(str(model), options, CPU, {}).command
    assert command[0].endswith("vllm")
    assert command[1:3] == ["serve", str(model)]
    assert command[-6:] == options
    assert command.count("--block-size") == 1


def test_parameters_and_ranks_count(model):
    override = '{"lola_config": {"sparse_cache_size": 0}}'
    small = state_bytes(model, sparse_cache_size=0)
    assert small < state_bytes(model)
    found = chosen(model, f"--hf-overrides={override}")
    assert int(found["--kv-cache-memory-bytes"]) == (64 + 1) * small
    found = chosen(model, "-tp", "2")
    assert int(found["--kv-cache-memory-bytes"]) < (64 + 1) * state_bytes(model)


def test_ranks_of_a_machine_share_the_room(model):
    """Two ranks get half each of what one would get, and replicas load the weights again."""
    state, weights = state_bytes(model), (model / "model.safetensors").stat().st_size // 2

    def pool(*options, ranks=1, copies=1):
        """Bytes that all ranks take, with just too little memory for 64 sequences."""
        processes = SERVER_BYTES + (ranks - 1) * RANK_BYTES
        memory = processes + copies * weights + 200 * state
        found = chosen(model, *options, machine=Machine("cpu", 8, memory))
        return ranks * int(found["--kv-cache-memory-bytes"])

    assert 90 * state < pool() <= 100 * state
    assert 90 * state < pool("-tp", "2", ranks=2) <= 100 * state
    assert 90 * state < pool("-pp", "2", ranks=2) <= 100 * state
    assert 90 * state < pool("-dp", "2", ranks=2, copies=2) <= 100 * state
    assert chosen(model, "-pp", "2")["--kv-cache-memory-bytes"] == str(193 * state // 2)
    # Two machines with a rank each: as much for each rank as for one that is alone.
    weights //= 2
    assert 90 * state < pool("-tp", "2", "--nnodes", "2") <= 100 * state


def test_the_dtype_is_the_fast_one_of_this_cpu(model):
    assert chosen(model)["--dtype"] == "bfloat16"
    found = chosen(model, env=AVX2)
    assert found["--dtype"] == "float32"
    assert int(found["--kv-cache-memory-bytes"]) == 65 * state_bytes(model, "float32")
    assert state_bytes(model, "float32") > state_bytes(model)
    (reason,) = (c.reason for c in plan(str(model), [], CPU, AVX2).options if c.name == "--dtype")
    assert "no bfloat16 instructions" in reason


def test_a_dtype_that_is_given_or_of_a_gpu_is_left_alone(model):
    found = chosen(model, "--dtype", "half", env=AVX2)
    assert "--dtype" not in found
    assert int(found["--kv-cache-memory-bytes"]) == 65 * state_bytes(model, "float16")
    assert chosen(model, "--dtype", "auto", env=AVX2)["--dtype"] == "float32"
    assert "--dtype" not in chosen(model, "--quantization", "awq", env=AVX2)
    assert "--dtype" not in chosen(model, machine=GPU, env=AVX2)


def test_eager_on_a_cpu_unless_told_or_needed_otherwise(model):
    assert "--enforce-eager" in chosen(model)
    for options in (["--no-enforce-eager"], ["--enforce-eager"], ["-pp", "2"], ["-O1"],
                    ["--compilation-config", "{}"], ["-cc.mode=3"]):  # fmt: skip
        assert "--enforce-eager" not in chosen(model, *options), options
    assert "--enforce-eager" not in chosen(model, machine=GPU)
    assert "" not in plan(str(model), [], CPU, {}).command  # a flag has no value


def test_it_listens_on_this_machine_alone_unless_told(model):
    assert chosen(model)["--host"] == "127.0.0.1"
    assert "--host" not in chosen(model, "--host", "0.0.0.0")
    assert "--host" not in chosen(model, "--uds=/tmp/socket")
    assert chosen(model, env={"LOLA_VLLM_HOST": "0.0.0.0"})["--host"] == "0.0.0.0"
    assert chosen("someone/model")["--host"] == "127.0.0.1"


def test_the_name_is_the_directorys(model, monkeypatch):
    assert chosen(model)["--served-model-name"] == "lola"
    assert "--served-model-name" not in chosen(model, "--served_model_name", "x")
    monkeypatch.chdir(model)
    assert chosen(".")["--served-model-name"] == "lola"


def test_answers_tell_of_cached_tokens(model):
    assert "--enable-prompt-tokens-details" in chosen(model)
    assert "--enable-prompt-tokens-details" not in chosen(
        model, "--no-enable-prompt-tokens-details"
    )


def test_blocks_fit_the_context(model):
    caching = "--enable-prefix-caching"
    assert int(chosen(model, caching, "--max-model-len", "128")["--block-size"]) == 64
    assert int(chosen(model, caching, "--max-model-len", "1k")["--block-size"]) <= 512


def test_what_is_no_directory_is_left_to_vllm():
    launched = plan("someone/model", ["--port", "80"], CPU, {})
    assert launched.command[1:3] == ["serve", "someone/model"]
    assert [choice.name for choice in launched.options] == [
        "--host", "--enable-prompt-tokens-details",
    ]  # fmt: skip
    assert launched.command[-2:] == ["--port", "80"]
    assert "left to vLLM" in launched.notes[0]
    assert launched.env


@pytest.mark.parametrize(
    ("options", "machine", "env", "words"),
    [
        ([], Machine("cpu", 2, GIB), {}, "are left for states"),
        (["--kv-cache-memory-bytes", "1k"], CPU, {}, "your --kv-cache-memory-bytes"),
        (["--hf-overrides", "{"], CPU, {}, "--hf-overrides: not valid JSON"),
        (["--config", "nowhere.yaml"], CPU, {}, "--config nowhere.yaml: cannot be read"),
        ([], CPU, {"VLLM_PLUGINS": "other"}, "VLLM_PLUGINS = 'other' leaves LoLA out"),
        (["-tp", "3"], CPU, {}, "tensor"),
    ],
    ids=["memory", "pool", "overrides", "config-file", "plugins", "ranks"],
)
def test_refusals(model, options, machine, env, words):
    with pytest.raises(ValueError, match=words):
        plan(str(model), options, machine, env)


def test_a_plain_llama_is_refused(model):
    with pytest.raises(ValueError, match="not a LoLA model"):
        plan(str(model.parent / "base"), [], CPU, {})


def test_dry_run_prints_every_choice_with_its_reason(model, capsys, monkeypatch):
    monkeypatch.setattr(launch, "this_machine", lambda cores: CPU)
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    assert cli.main(["serve", "--dry-run", str(model), "--port", "80"]) == 0
    out = capsys.readouterr().out
    assert "  --max-num-seqs 64\n      32 per core" in out
    assert "VLLM_PLUGINS=lola" in out
    assert out.splitlines()[-1].startswith("running: ") and out.splitlines()[-1].endswith("80")


@pytest.mark.parametrize("named", ["a directory", "someone/model"])
@pytest.mark.parametrize("last", [True, False])
def test_dry_run_starts_nothing_wherever_it_stands(model, named, last, capsys, monkeypatch):
    monkeypatch.setattr(launch.os, "execve", lambda *args: pytest.fail("vLLM was started"))
    monkeypatch.setattr(launch, "this_machine", lambda cores: CPU)
    name = named if "/" in named else str(model)
    words = [name, "--port", "80", "--dry-run"] if last else ["--dry-run", name, "--port", "80"]
    assert cli.main(["serve", *words]) == 0
    running = capsys.readouterr().out.splitlines()[-1]
    assert f"serve {name} " in running and running.endswith("--port 80")


def test_help_has_the_options_of_the_store_which_may_stand_before_the_model(
    model, capsys, monkeypatch
):
    with pytest.raises(SystemExit):
        cli.main(["serve", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name, option in store_options.OPTIONS.items():
        value = f"{option.metavar} " if option.metavar else ""
        assert f"{name} {value}{' '.join(option.help.split())}" in text
    monkeypatch.setattr(launch, "this_machine", lambda cores: CPU)
    words = ["--lola-state-ram", "1GiB", "--lola-list-sessions", "--dry-run", str(model)]
    assert cli.main(["serve", *words, "--lola-state-dir", "/x"]) == 0
    running = capsys.readouterr().out.splitlines()[-1]
    given = '{"lola": {"state_ram": "1GiB", "list_sessions": true, "state_dir": "/x"}}'
    assert given in running


def test_keys_are_not_printed_but_passed_on(model, capsys, monkeypatch):
    called = []
    monkeypatch.setattr(launch.os, "execve", lambda *args: called.append(args))
    monkeypatch.setattr(launch, "this_machine", lambda cores: CPU)
    cli.main(["serve", str(model), "--api-key", "secret-1", "secret-2", "--hf_token=secret-3"])
    printed = capsys.readouterr()
    assert "secret" not in printed.out + printed.err
    assert called[0][1][-4:] == ["--api-key", "secret-1", "secret-2", "--hf_token=secret-3"]


@pytest.mark.parametrize("options", [["--api-key=SECRET"], ["--api-key", "SECRET"]])
def test_a_key_before_the_model_is_refused_without_being_shown(model, options, capsys):
    with pytest.raises(SystemExit):
        cli.main(["serve", *options, str(model)])
    printed = capsys.readouterr()
    assert "--api-key" in printed.err and "after the model" in printed.err
    assert "SECRET" not in printed.out + printed.err


def test_it_gives_the_process_to_vllm(model, monkeypatch):
    called = []
    monkeypatch.setattr(launch.os, "execve", lambda *args: called.append(args))
    monkeypatch.setattr(launch, "this_machine", lambda cores: CPU)
    cli.main(["serve", str(model)])
    ((program, command, environment),) = called
    assert program == command[0] and command[2] == str(model)
    assert "lola" in environment["VLLM_PLUGINS"]


@pytest.mark.slow
def test_vllm_gets_every_core_though_torch_leaves_this_process_fewer(model):
    """With OMP_NUM_THREADS = 1, importing torch binds the process to one core."""
    code = (
        "import os, sys\n"
        "os.execve = lambda *args: print('cpus', os.sched_getaffinity(0))\n"
        "from lola_vllm.command.cli import main\n"
        "print('cpus', os.sched_getaffinity(0))\n"
        f"main(['serve', {str(model)!r}])\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    before, after = (line for line in run.stdout.splitlines() if line.startswith("cpus"))
    assert before == after
    assert f"{len(os.sched_getaffinity(0))} cores" in run.stdout


def test_states_are_stored_in_memory_that_the_pool_leaves(model):
    found = chosen(model)
    ram = json.loads(found["--additional-config"])["lola"]["state_ram"]
    assert ram == 64 * state_bytes(model)
    weights = (model / "model.safetensors").stat().st_size // 2
    memory = SERVER_BYTES + weights + 2 * 40 * state_bytes(model)
    found = chosen(model, machine=Machine("cpu", 8, memory))
    assert json.loads(found["--additional-config"])["lola"]["state_ram"] == 10 * state_bytes(model)
    memory = SERVER_BYTES + weights + 2 * 7 * state_bytes(model)
    assert "--additional-config" not in chosen(model, machine=Machine("cpu", 8, memory))
    found = chosen(model, machine=GPU._replace(host=64 * GIB))
    assert json.loads(found["--additional-config"])["lola"]["state_ram"] == ram


@pytest.mark.parametrize(
    ("options", "stored"),
    [
        (["--lola-state-ram", "0"], {"state_ram": "0"}),
        (["--lola-state-ram=2GiB", "--lola-state-dir", "/x"],
         {"state_ram": "2GiB", "state_dir": "/x"}),
        (["--lola-state-dir", "/x"], {"state_ram": STORED, "state_dir": "/x"}),
        (["--additional-config", '{"lola": {"state_ram": 7}, "a": 1}', "--lola_state_disk=1G"],
         {"state_ram": 7, "state_disk": "1G"}),
        (["--lola-store", "none"], {"store": "none"}),
        (["--lola-list-sessions", "--lola-allowed-hosts", "a,b"],
         {"list_sessions": True, "allowed_hosts": "a,b", "state_ram": STORED}),
        (["--kv-transfer-config", "{}"], None),
    ],
)  # fmt: skip
def test_the_users_store_is_taken(model, options, stored):
    launched = plan(str(model), [*options, "--port", "8123"], CPU, {})
    values = [c.value for c in launched.options if c.name == "--additional-config"]
    assert [json.loads(value)["lola"] for value in values] == ([stored] if stored else [])
    assert not any("lola-state" in part for part in launched.command)
    assert launched.command[-2:] == ["--port", "8123"]
    assert all(json.loads(value).get("a", 1) == 1 for value in values)
    assert ('"a": 1' in "".join(options)) == any("a" in json.loads(value) for value in values)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--lola-state-ram", "0"], "nothing is stored"),
        (["--lola-store=none", "--lola-state-dir", "/x"], "nothing is stored"),
        (["--lola-state-dir", "/x"], "those of conversations with a name also in /x"),
        (["--lola-state-dir", "/x", "--lola-store=all"], "those of conversations also in /x"),
        (["--lola-list-sessions"], "in memory only"),
    ],
)
def test_the_reason_of_a_store_is_true(model, options, reason):
    (choice,) = [c for c in plan(str(model), options, CPU, {}).options
                 if c.name == "--additional-config"]  # fmt: skip
    assert reason in choice.reason


def test_a_large_store_takes_from_the_pool(model):
    state = state_bytes(model)
    weights = (model / "model.safetensors").stat().st_size // 2
    memory = SERVER_BYTES + weights + 2 * 31 * state
    machine = Machine("cpu", 8, memory)
    found = chosen(model, "--lola-state-ram", str(47 * state), machine=machine)
    assert int(found["--kv-cache-memory-bytes"]) <= 15 * state


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--lola-state-ram", "much"], "--lola-state-ram = 'much'"),
        (["--lola-state-dir"], "--lola-state-dir: expects a value"),
        (["--lola-store", "some"], "--lola-store = 'some': must be one of named, all, none"),
        (["--lola-list-sessions=1"], "--lola-list-sessions = '1': it takes no value"),
        (["--additional-config", "{"], "--additional-config: not valid JSON"),
        (["--additional-config", '{"lola": 3}'], "must be an object"),
        (["--additional-config", '{"lola": {"ram": 3}}'], "lola.ram: unknown setting"),
    ],
)
def test_options_of_the_store_that_cannot_be_used(model, options, words):
    with pytest.raises(launch.CheckpointError) as error:
        plan(str(model), options, CPU, {})
    assert words in str(error.value)
