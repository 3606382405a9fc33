"""What `lola-vllm serve` chooses, that the user's options win, and what it refuses."""

import json
import os
import subprocess
import sys

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from lola_vllm.command import cli
from lola_vllm.serving import launch
from lola_vllm.serving.launch import Launch, Machine
from lola_vllm.serving.options import named_options
from lola_vllm.serving.store_options import StoreOptions

CPU = Machine("cpu", 2)
AVX2 = {"LOLA_VLLM_CPU_ISA": "avx2"}  # a CPU without bfloat16 instructions
GPU = Machine("cuda", 16)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
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
    monkeypatch.setattr(launch.cpu, "flags", lambda: frozenset({"avx2", "avx512_bf16"}))


def plan(model, options=(), machine=CPU, env=None) -> Launch:
    return launch.plan(str(model), StoreOptions.parse(options), machine, env or {})


def chosen(model, *options, machine=CPU, env=None):
    launched = plan(model, options, machine, env)
    return {choice.name: choice.value for choice in (*launched.options, *launched.env)}


# What says that prefix caching is wanted, or leaves no store to take its place.
CACHING = (
    "--enable-prefix-caching", "--block-size=64", "--lola-state-ram=0", "--lola-store=none",
    "--kv-events-config={}", "--data-parallel-size=2", "--pipeline-parallel-size=2",
)  # fmt: skip
COMPILING = ("--no-enforce-eager", "--enforce-eager", "-pp=2", "-O1", "--compilation-config={}",
             "-cc.mode=3")  # fmt: skip
NO_COMPILER = {"CXX": "none-such"}
BUSY = Machine("cpu", 2, busy=0.5)
WAITS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


@pytest.mark.parametrize(
    ("name", "value", "options", "machine", "env"),
    [
        ("--max-num-seqs", "64", "", CPU, {}),  # 32 per core
        ("--max-num-seqs", None, "--max_num_seqs=7", CPU, {}),
        ("VLLM_CPU_OMP_THREADS_BIND", "nobind", "", CPU, {}),
        ("VLLM_CPU_OMP_THREADS_BIND", None, "", CPU, {"VLLM_CPU_OMP_THREADS_BIND": "0-1"}),
        ("VLLM_PLUGINS", None, "", CPU, {"VLLM_PLUGINS": "a,lola"}),
        # Threads spin on an idle machine alone.
        ("GOMP_SPINCOUNT", "20000", "", CPU, {}),
        ("GOMP_SPINCOUNT", None, "", BUSY, {}),
        ("OMP_WAIT_POLICY", "PASSIVE", "", BUSY, {}),
        *((name, None, "", CPU, {given: "1"}) for name in WAITS for given in WAITS),
        # The store takes the place of prefix caching.
        ("--no-enable-prefix-caching", "", "", CPU, {}),
        ("--no-enable-prefix-caching", "", "--lola-state-dir=/x", CPU, {}),
        ("--block-size", None, "", CPU, {}),
        *(("--no-enable-prefix-caching", None, given, CPU, {}) for given in CACHING),
        # The dtype is the fast one of this CPU.
        ("--dtype", "bfloat16", "", CPU, {}),
        ("--dtype", "float32", "", CPU, AVX2),
        ("--dtype", None, "--dtype=half", CPU, AVX2),
        ("--dtype", None, "--quantization=awq", CPU, AVX2),
        ("--dtype", None, "", GPU, AVX2),
        # It compiles as vLLM does, where that can be.
        ("--enforce-eager", None, "", CPU, {}),
        ("--enforce-eager", "", "", CPU, NO_COMPILER),
        ("--enforce-eager", None, "", GPU, NO_COMPILER),
        *(("--enforce-eager", None, given, CPU, NO_COMPILER) for given in COMPILING),
        # It listens on this machine alone, unless told.
        ("--host", "127.0.0.1", "", CPU, {}),
        ("--host", None, "--host=0.0.0.0", CPU, {}),
        ("--host", None, "--uds=/tmp/socket", CPU, {}),
        ("--host", "0.0.0.0", "", CPU, {"LOLA_VLLM_HOST": "0.0.0.0"}),
        ("--served-model-name", "lola", "", CPU, {}),
        ("--served-model-name", None, "--served_model_name=x", CPU, {}),
    ],
)
def test_what_is_chosen(model, name, value, options, machine, env):
    assert chosen(model, *options.split(), machine=machine, env=env).get(name) == value


def test_the_users_options_come_last_and_whole(model):
    options = ["--port", "80", "--block-size", "32", "-tp", "1"]
    command = plan(model, options).command
    assert command[0].endswith("vllm")
    assert command[1:3] == ["serve", str(model)]
    assert command[-6:] == options
    assert command.count("--block-size") == 1
    assert "" not in command  # a flag has no value


def test_the_name_is_the_directorys(model, monkeypatch):
    monkeypatch.chdir(model)
    assert chosen(".")["--served-model-name"] == "lola"


def test_what_is_no_directory_is_left_to_vllm():
    launched = plan("someone/model", ["--port", "80"])
    assert launched.command[1:3] == ["serve", "someone/model"]
    assert [choice.name for choice in launched.options] == [
        "--host", "--enable-prompt-tokens-details",
    ]  # fmt: skip
    assert launched.options[0].value == "127.0.0.1"
    assert launched.command[-2:] == ["--port", "80"]
    assert "left to vLLM" in launched.notes[0]
    assert launched.env


def test_models_and_plugins_without_lola_are_refused(model):
    with pytest.raises(ValueError, match="VLLM_PLUGINS = 'other' leaves LoLA out"):
        plan(model, env={"VLLM_PLUGINS": "other"})
    with pytest.raises(ValueError, match=r"RUST_FRONTEND = 1: .* /v1/lola.* unset VLLM_USE_RUST"):
        plan(model, env={"VLLM_USE_RUST_FRONTEND": "1"})
    assert plan(model, env={"VLLM_USE_RUST_FRONTEND": "0"}).env
    with pytest.raises(ValueError, match="not a LoLA model"):
        plan(model.parent / "base")


def test_dry_run_prints_every_choice_with_its_reason(model, capsys, monkeypatch):
    monkeypatch.setattr(launch, "this_machine", lambda cpus: CPU)
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.setenv("LOLA_VLLM_CPU_ISA", "avx2")
    assert cli.main(["serve", "--dry-run", str(model), "--port", "80"]) == 0
    out = capsys.readouterr().out
    assert "  --max-num-seqs 64\n      32 per core" in out
    assert "VLLM_PLUGINS=lola" in out and "no bfloat16 instructions" in out
    running = out.splitlines()[-1]
    assert running.startswith(f"running: vllm serve {model} --served-model-name lola --host ")
    assert running.endswith(" and your options") and "80" not in running


@pytest.mark.parametrize("named", ["a directory", "someone/model"])
@pytest.mark.parametrize("last", [True, False])
def test_dry_run_starts_nothing_wherever_it_stands(model, named, last, capsys, monkeypatch):
    monkeypatch.setattr(launch.os, "execve", lambda *args: pytest.fail("vLLM was started"))
    monkeypatch.setattr(launch, "this_machine", lambda cpus: CPU)
    name = named if "/" in named else str(model)
    words = [name, "--port", "80", "--dry-run"] if last else ["--dry-run", name, "--port", "80"]
    assert cli.main(["serve", *words]) == 0
    running = capsys.readouterr().out.splitlines()[-1]
    assert f"serve {name} " in running


def test_keys_are_not_printed_but_passed_on(model, capsys, monkeypatch):
    called = []
    monkeypatch.setattr(launch.os, "execve", lambda *args: called.append(args))
    monkeypatch.setattr(launch, "this_machine", lambda cpus: CPU)
    cli.main(["serve", str(model), "--api-key", "secret-1", "secret-2", "--hf_token=secret-3"])
    printed = capsys.readouterr()
    assert "secret" not in printed.out + printed.err
    ((program, command, environment),) = called
    assert program == command[0] and command[2] == str(model)
    assert "lola" in environment["VLLM_PLUGINS"]
    assert command[-4:] == ["--api-key", "secret-1", "secret-2", "--hf_token=secret-3"]


@pytest.mark.parametrize("options", [["--api-key=SECRET"], ["--api-key", "SECRET"]])
def test_a_key_before_the_model_is_refused_without_being_shown(model, options, capsys):
    with pytest.raises(SystemExit):
        cli.main(["serve", *options, str(model)])
    printed = capsys.readouterr()
    assert "--api-key" in printed.err and "after the model" in printed.err
    assert "SECRET" not in printed.out + printed.err


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


@pytest.mark.parametrize(
    ("options", "stored"),
    [
        (["--lola-state-ram", "0"], {"state_ram": "0"}),
        (["--lola-state-ram=2GiB", "--lola-state-dir", "/x"],
         {"state_ram": "2GiB", "state_dir": "/x"}),
        (["--lola-state-dir", "/x"], {"state_ram": "auto", "state_dir": "/x"}),
        (["--additional-config", '{"lola": {"state_ram": 7}, "a": 1}', "--lola_state_disk=1G"],
         {"state_ram": 7, "state_disk": "1G"}),
        ([], {"state_ram": "auto"}),
        (["--lola-store", "none"], {"store": "none"}),
        (["--lola-list-sessions", "--lola-allowed-hosts", "a,b"],
         {"list_sessions": True, "allowed_hosts": "a,b", "state_ram": "auto"}),
        (["--kv-transfer-config", "{}"], None),
    ],
)  # fmt: skip
def test_the_users_store_is_taken(model, options, stored):
    launched = plan(model, [*options, "--port", "8123"])
    values = [c.value for c in launched.options if c.name == "--additional-config"]
    assert [json.loads(value)["lola"] for value in values] == ([stored] if stored else [])
    assert not any("lola-state" in part for part in launched.command)
    assert launched.command[-2:] == ["--port", "8123"]
    assert all(json.loads(value).get("a", 1) == 1 for value in values)
    assert ('"a": 1' in "".join(options)) == any("a" in json.loads(value) for value in values)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--lola-state-ram", "much"], "--lola-state-ram = 'much'"),
        (["--lola-state-dir"], "--lola-state-dir: expected one argument"),
        (["--lola-store", "some"], "--lola-store = 'some': must be one of named, all, none"),
        (["--lola-list-sessions=1"], "--lola-list-sessions: ignored explicit argument '1'"),
        (["--additional-config", "{"], "--additional-config: not valid JSON"),
        (["--additional-config", '{"lola": 3}'], "must be an object"),
        (["--additional-config", '{"lola": {"ram": 3}}'], "lola.ram: unknown setting"),
    ],
)
def test_options_of_the_store_that_cannot_be_used(model, options, words):
    with pytest.raises(launch.CheckpointError) as error:
        plan(model, options)
    assert words in str(error.value)


def test_options_as_vllm_spells_them(tmp_path):
    path = tmp_path / "options.yaml"
    path.write_text("max-num-seqs: 9\nblock_size: 64\nenforce-eager: false\n")
    named = named_options(
        ["--config", str(path), "--api-key", "a", "b", "-pp", "2", "--x_y=1", "y", "-cc.mode=3",
         "-O2", "--hf-overrides.a.b", "7", "--seed", "-1"]
    )  # fmt: skip
    assert named == {
        "config", "max-num-seqs", "block-size", "enforce-eager", "api-key",
        "pipeline-parallel-size", "x-y", "compilation-config", "optimization-level",
        "hf-overrides", "seed",
    }  # fmt: skip
    assert named_options([f"--config={path}"]) >= {"max-num-seqs"}


@pytest.mark.parametrize(
    "text", ["api-key: [SECRET\nport: 80\n", "- SECRET\n", "\tapi-key: SECRET"]
)
def test_errors_of_a_config_file_show_nothing_of_it(tmp_path, text):
    path = tmp_path / "options.yaml"
    path.write_text(text)
    with pytest.raises(launch.CheckpointError) as error:
        named_options(["--config", str(path)])
    assert str(path) in str(error.value) and "SECRET" not in str(error.value)
