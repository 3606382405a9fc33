"""Rows of vLLM's and of transformers' RoPE tables turn keys as the tables would have."""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import get_rope

from lola_vllm.core.config import config_class
from lola_vllm.core.lola_config import LolaConfigError
from lola_vllm.core.ops.key_rotation import KeyRotation
from lola_vllm.core.ops.shift_schedule import ShiftSchedule
from lola_vllm.engine.vllm.compat import rope_rows

SCHEDULE = ShiftSchedule(4096, 1024)
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 1e5},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 2048,
    },
    "yarn": {
        "rope_type": "yarn", "rope_theta": 1e5, "factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
    "partial": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ROPES)
def test_keys_turn_as_the_table_of_vllm_has_them(name, dtype):
    with set_current_vllm_config(VllmConfig()):
        rope = get_rope(
            64, max_position=SCHEDULE.length, rope_parameters=ROPES[name], is_neox_style=True,
            dtype=dtype,
        )  # fmt: skip
    table = rope_rows(rope, (0, SCHEDULE.interval))
    assert table.dtype == torch.float32  # whatever the model's
    assert len(table[0]) == rope.rotary_dim == (32 if name == "partial" else 64)
    rotation = KeyRotation.of_table(SCHEDULE, *table.chunk(2, dim=-1))
    torch.testing.assert_close(rotation.cos**2 + rotation.sin**2, torch.ones_like(rotation.cos))
    positions, k = torch.tensor([1024, 2000, 4095]), torch.randn(3, 64)
    full = rope._compute_cos_sin_cache()

    def turned(at):
        args = (64, rope.rotary_dim, full, True)
        return rope.forward_static(at, k.clone(), None, *args)[0]

    torch.testing.assert_close(
        rotation.rotate_back(turned(positions)), turned(positions - 1024), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("name", ["default", "llama3", "yarn"])
def test_both_runtimes_turn_alike(name):
    config = config_class("llama")(
        hidden_size=128, num_attention_heads=2, head_dim=64, rope_parameters=ROPES[name],
        max_position_embeddings=SCHEDULE.length,
    )  # fmt: skip
    rows = torch.tensor([[0, SCHEDULE.interval]])
    cos, sin = (x[0, :, :32] for x in LlamaRotaryEmbedding(config)(torch.empty(1), rows))
    theirs = KeyRotation.of_table(SCHEDULE, cos, sin)
    with set_current_vllm_config(VllmConfig()):
        rope = get_rope(
            64, max_position=SCHEDULE.length, rope_parameters=config.rope_parameters,
            is_neox_style=True, dtype=torch.float32,
        )  # fmt: skip
    ours = KeyRotation.of_table(SCHEDULE, *rope_rows(rope, (0, SCHEDULE.interval)).chunk(2, dim=-1))
    torch.testing.assert_close(ours.cos, theirs.cos, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(ours.sin, theirs.sin, rtol=1e-3, atol=1e-3)


def test_a_rope_with_several_tables_is_refused():
    with pytest.raises(LolaConfigError, match=r"context_shift: object has several tables.*to 0"):
        rope_rows(object(), (0, 1))
