"""Data sheets, and the time that they allow."""

import dataclasses

import pytest

from lola_vllm.gpu_cost.gpus import CHAIN_STEP_S, GPUS, Chain, Cost, Gpu, Part, gpu_named

GPU = Gpu("ten of each", 1e9, 1e9, 60e9, 5e9, 10, 1e6)


def test_data_sheets_have_every_number():
    for gpu in GPUS.values():
        assert all(x > 0 for x in dataclasses.astuple(gpu)[1:])
        assert gpu.bf16_flops > gpu.fp32_flops and gpu.memory_bytes > gpu.l2_bytes


def test_names_have_no_case_and_unknown_ones_are_refused():
    assert gpu_named("H100") is GPUS["h100"]
    with pytest.raises(ValueError, match="gpu = 'b200': must be one of h100, a100, l4, 4090"):
        gpu_named("b200")


@pytest.mark.parametrize(
    "part, seconds",
    [
        (Part("bandwidth", 2e9, 1e9), 2.0),
        (Part("arithmetic", 1e9, 120e9), 2.0),
        (Part("half the rate", 0, 60e9, "tf32"), 2.0),
        (Part("three products", 0, 20e9, "tf32x3"), 2.0),
        (Part("no tensor cores", 0, 10e9, "fp32"), 2.0),
        (Part("one of ten processors", 0, 0, chain=Chain(flops=12e9)), 2.0),
        (Part("four shares of bandwidth", 0, 0, chain=Chain(bytes=0.8e9)), 2.0),
        (Part("waits", 0, 0, chain=Chain(flops=12e9, steps=1e6)), 2.0 + 1e6 * CHAIN_STEP_S),
    ],
    ids=lambda x: x.name if isinstance(x, Part) else "",
)
def test_the_slowest_of_a_part_decides(part: Part, seconds: float):
    assert part.seconds(GPU) == pytest.approx(seconds)


def test_parts_and_launches_add_up():
    cost = Cost("any", (Part("a", 1e9, 0), Part("b", 0, 60e9)), graph_launches=100, host_launches=5)
    assert cost.launches == 105
    assert cost.launch_seconds == pytest.approx(100 * 4e-6 + 5 * 10e-6)
    assert cost.seconds(GPU) == pytest.approx(2 + cost.launch_seconds)
    found = cost.to_json(GPU)
    assert found["bytes"] == 1e9 and found["flops"] == 60e9
    assert found["seconds"] == cost.seconds(GPU)
