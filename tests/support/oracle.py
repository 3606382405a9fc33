"""The whole model recomputed in float64 by the reference: what every greedy token must obey.

transformers' Llama with its attention function replaced by `ops.reference.lola_attention`,
one forward over the whole sequence: no pages, no batches, no splits. Places beyond the trained
length are written out here a second time.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lola_vllm.core.config import DecoderConfig
from lola_vllm.core.ops.key_rotation import KeyRotation
from lola_vllm.core.ops.reference import lola_attention
from lola_vllm.core.ops.shift_schedule import ShiftSchedule

_MAPS = ("feature_map_q", "feature_map_k", "window_factors", "importance")


class Oracle:
    """log-probabilities `[T, vocab]` of a LoLA checkpoint directory, in float64."""

    def __init__(self, directory: Path) -> None:
        config = DecoderConfig.from_pretrained(directory)
        fields = {
            k: v for k, v in config.to_dict().items() if k not in ("lola_config", "model_type")
        }
        tensors = load_file(directory / "model.safetensors")
        maps = {k: tensors.pop(k).double() for k in list(tensors) if k.endswith(_MAPS)}
        self.model = LlamaForCausalLM(LlamaConfig(**fields)).double()
        self.model.load_state_dict({k: v.double() for k, v in tensors.items()}, strict=False)
        self.model.eval()
        self.model.config._attn_implementation = "lola_oracle"
        length, interval = config.max_position_embeddings, config.lola.context_shift
        rotation = None
        if interval:
            angles = interval * self.model.model.rotary_emb.inv_freq.double()
            rotation = KeyRotation(ShiftSchedule.of(config), angles.cos(), angles.sin())
        self.rope_position = lambda p: (
            p if p < length or not interval else length - interval + (p - length) % interval
        )

        def attention(
            module: torch.nn.Module, q: Tensor, k: Tensor, v: Tensor, *_: object, **__: object
        ) -> tuple[Tensor, None]:
            prefix = f"model.layers.{module.layer_idx}.self_attn"
            *weights, importance = (maps.get(f"{prefix}.{name}") for name in _MAPS)
            out, _state = lola_attention(
                *(x[0].transpose(0, 1) for x in (q, k, v)),
                *weights,
                config.lola.for_layer(module.layer_idx),
                importance,
                rotation,
            )
            return out[None], None

        ALL_ATTENTION_FUNCTIONS["lola_oracle"] = attention

    @torch.no_grad()
    def logprobs(self, token_ids: list[int]) -> Tensor:
        """One row per position: the distribution of the next token."""
        positions = torch.tensor([[self.rope_position(p) for p in range(len(token_ids))]])
        output = self.model(torch.tensor([token_ids]), position_ids=positions)
        return output.logits[0].log_softmax(-1)


def assert_obeys(oracle: Oracle, prompt: list[int], tokens: list[int]) -> None:
    """Every greedy token is the oracle's choice, or ties with it below rounding."""
    logprobs = oracle.logprobs(prompt + tokens[:-1])[len(prompt) - 1 :]
    chosen = logprobs[range(len(tokens)), tokens]
    assert (logprobs.max(-1).values - chosen).max() < 1e-4
