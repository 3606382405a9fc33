"""What `lola-vllm serve` chooses, that the user's options win, and what it refuses."""

import json
import os
import subprocess
import sys

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from lola_vllm import cli
from lola_vllm.estimate import GIB, estimate
from lola_vllm.serving import launch
from lola_vllm.serving.launch import Machine, given_options, plan

CPU = Machine("cpu", 2, 16 * GIB)
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


def chosen(model, *options, machine=CPU, env=None):
    launched = plan(str(model), options, machine, env or {})
    return {choice.name: choice.value for choice in (*launched.options, *launched.env)}


def state_bytes(model, **lola):
    row = next(row for row in estimate(model, lola).rows if row.chosen)
    return row.bytes_per_sequence


def test_on_a_cpu(model):
    found = chosen(model)
    assert found["--max-num-seqs"] == "64"  # 32 per core
    assert int(found["--kv-cache-memory-bytes"]) == (3 * 64 + 1) * state_bytes(model)
    even = estimate(model).rows[0].layout.break_even_tokens()
    assert int(found["--block-size"]) >= even > int(found["--block-size"]) // 2
    assert found["OMP_WAIT_POLICY"] == "PASSIVE"
    assert found["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert found["VLLM_PLUGINS"].split(",")[0] == "lola"


def test_on_a_gpu_vllm_sizes_the_pool(model):
    found = chosen(model, machine=GPU)
    assert found["--max-num-seqs"] == "256"
    assert "--kv-cache-memory-bytes" not in found
    assert "OMP_WAIT_POLICY" not in found and "VLLM_PLUGINS" in found


def test_memory_bounds_the_sequences(model):
    state = state_bytes(model)
    weights = (model / "model.safetensors").stat().st_size
    # Half of what is left holds ten sequences of three states, the null block, and a bit.
    memory = launch.CPU_OVERHEAD + weights + 2 * (31 * state + state // 2)
    found = chosen(model, machine=Machine("cpu", 8, memory))
    assert found["--max-num-seqs"] == "10"
    assert int(found["--kv-cache-memory-bytes"]) == 31 * state
    found = chosen(model, "--no-enable-prefix-caching", machine=Machine("cpu", 8, memory))
    assert found["--max-num-seqs"] == "30"
    assert "--block-size" not in found


@pytest.mark.parametrize("given", [["--max-num-seqs", "7"], ["--max_num_seqs=7"]])
def test_the_users_sequences_size_the_pool(model, given):
    found = chosen(model, *given)
    assert "--max-num-seqs" not in found
    assert int(found["--kv-cache-memory-bytes"]) == (3 * 7 + 1) * state_bytes(model)


def test_the_users_pool_bounds_the_sequences(model):
    pool = (3 * 5 + 1) * state_bytes(model)
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
    assert int(found["--kv-cache-memory-bytes"]) == (3 * 64 + 1) * small
    found = chosen(model, "-tp", "2")
    assert int(found["--kv-cache-memory-bytes"]) < (3 * 64 + 1) * state_bytes(model)


def test_blocks_fit_the_context(model):
    assert int(chosen(model, "--max-model-len", "128")["--block-size"]) == 64
    assert int(chosen(model, "--max-model-len", "1k")["--block-size"]) <= 512


def test_a_config_file_counts_and_the_command_line_goes_before_it(tmp_path):
    path = tmp_path / "options.yaml"
    path.write_text("max-num-seqs: 9\nblock_size: 64\nhf-overrides: {a: 1}\n")
    given = given_options(["--config", str(path), "--block-size", "128"])
    assert given["max-num-seqs"] == "9" and given["block-size"] == "128"
    assert json.loads(given["hf-overrides"]) == {"a": 1}


def test_options_as_vllm_spells_them():
    given = given_options(["--enforce-eager", "--api-key", "a", "b", "-tp", "2", "--x=1", "y"])
    assert given == {"enforce-eager": "", "api-key": "a", "tensor-parallel-size": "2", "x": "1"}


@pytest.mark.parametrize(
    ("text", "value"),
    [("12", 12), ("2k", 2000), ("2K", 2048), ("1.5M", 3 * 2**19), ("auto", None), ("", None)],
)
def test_numbers_as_vllm_reads_them(text, value):
    assert launch._number(text) == value


def test_what_is_no_directory_is_left_to_vllm():
    launched = plan("someone/model", ["--port", "80"], CPU, {})
    assert launched.command[1:] == ["serve", "someone/model", "--port", "80"]
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


def test_it_gives_the_process_to_vllm(model, monkeypatch):
    called = []
    monkeypatch.setattr(launch.os, "execve", lambda *args: called.append(args))
    monkeypatch.setattr(launch, "this_machine", lambda cores: CPU)
    cli.main(["serve", str(model)])
    ((program, command, environment),) = called
    assert program == command[0] and command[2] == str(model)
    assert "lola" in environment["VLLM_PLUGINS"]


def test_vllm_gets_every_core_though_torch_leaves_this_process_fewer(model):
    """With OMP_NUM_THREADS = 1, importing torch binds the process to one core."""
    code = (
        "import os, sys\n"
        "os.execve = lambda *args: print('cpus', os.sched_getaffinity(0))\n"
        "from lola_vllm.cli import main\n"
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
