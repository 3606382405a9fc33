"""The CUDA sources compile and link, on machines without a GPU."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "compile_cuda.py"
# The oldest, whose instructions the newer have, and the dtype that takes most registers; the tool
# has the others too.
ARCH, DECODE = "80", "bf16"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed"),
]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Folder with the linked kernels, and the rows of the table."""
    folder = tmp_path_factory.mktemp("cuda")
    result = subprocess.run(
        [
            *(sys.executable, str(SCRIPT), "--archs", ARCH, "--decode", DECODE),
            *("--out", str(folder)),
        ],
        capture_output=True,
        text=True,
    )
    print(result.stdout)
    assert result.returncode == 0, result.stderr
    return folder, json.loads((folder / "table.json").read_text())


def test_every_kernel_is_there_and_spills_nothing(compiled):
    _, rows = compiled
    names = {row["name"] for row in rows}
    types = {"float", "Bf16", "F16"}
    sizes = {(0, 1), *((d, heads) for d in (64, 96, 128) for heads in (1, 4, 8))}
    assert names == {
        "features_kernel",
        *(
            f"decode_kernel<Bf16, {d}, {heads}, {int8}>"
            for d, heads in sizes
            for int8 in ("false", "true")
        ),
        *(f"update_kernel<{t}, {int8}>" for t in types for int8 in ("false", "true")),
    }
    assert {row["arch"] for row in rows} == {ARCH} and len(rows) == len(names)
    spilling = [row for row in rows if row["spill_stores"] or row["spill_loads"] or row["stack"]]
    assert spilling == []
    assert all(0 < row["registers"] <= 255 for row in rows)


def test_the_library_registers_the_op(compiled):
    """Loaded beside the CPU ops, with a stand-in for what only a CUDA torch defines and for the
    kernels that were left out."""
    folder, _ = compiled
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", str(folder / "lola_cuda.so")],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    missing = [name for name in listed.split() if "launch_decode" in name]
    assert len(missing) == 2
    stand_in = folder / "stand_in.cpp"
    stand_in.write_text(
        'extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }'
        + "".join(f'extern "C" void {name}() {{}}' for name in missing)
    )
    subprocess.run(
        ["g++", "-shared", "-fPIC", "-o", str(folder / "stand_in.so"), str(stand_in)], check=True
    )
    check = f"""
import ctypes, torch
from lola_vllm.core.ops import cpp
assert cpp.load()
has = torch._C._dispatch_has_kernel_for_dispatch_key
assert not has("lola::decode", "CUDA"), "built in already"
ctypes.CDLL({str(folder / "stand_in.so")!r}, mode=ctypes.RTLD_GLOBAL)
torch.ops.load_library({str(folder / "lola_cuda.so")!r})
assert has("lola::decode", "CUDA") and has("lola::decode", "CPU")
print("registered")
"""
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    if "built in already" in result.stderr:
        pytest.skip("the extension has its CUDA kernels already")
    assert result.stdout.strip() == "registered", result.stderr
