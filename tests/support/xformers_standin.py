"""xformers' partial attention done densely, for machines without its kernels.

Who sees whom is decided by xformers' own mask, and what its kernels would refuse by its own checks,
those of the device aside.
"""

import torch
from xformers.ops import fmha

from lola_vllm.kernels import xformers_prefill

# Reasons against a kernel that tell of this machine, or of float32, which tests use to see errors
# that 16-bit rounding would hide.
EXPECTED = ("device=", "dtype=torch.float32", "operator wasn't built", "bf16 is only")
calls = []  # the masks that were asked for


def attention(query, key, value, attn_bias=None, **options):
    """As `fmha.memory_efficient_attention_partial`, summed in float64."""
    inputs = fmha.common.Inputs(query, key, value, attn_bias, is_partial=True, **options)
    inputs.validate_inputs()
    inputs.normalize_bmhk()
    reasons = fmha.flash.FwOp.not_supported_reasons(inputs)
    reasons = [reason for reason in reasons if not reason.startswith(EXPECTED)]
    assert not reasons, reasons
    assert key.stride(3) == 0 or key.shape[3] == 1, "keys are copied for every query head"
    calls.append(attn_bias)
    mask = attn_bias.materialize((query.shape[1], key.shape[1]), torch.float64)
    q, k, v = (x[0].permute(1, 2, 0, 3).double() for x in (query, key, value))
    logits = q @ k.mT / q.shape[-1] ** 0.5 + mask  # [Hkv, group, T, N]
    # No `where`: like a kernel's products, a zero weight does not hide another row's NaN.
    out = logits.softmax(-1) @ v
    lse = logits.logsumexp(-1)
    return out.permute(2, 0, 1, 3)[None].to(query.dtype).contiguous(), lse[None].float()


def prefill(layer, q, k, v, batch, out):
    """`contract.PrefillOp` by xformers, which is asked wherever a layer is suited."""
    before = len(calls)
    xformers_prefill.prefill(layer, q, k, v, batch, out)
    suited = xformers_prefill.unsuited(layer.layout.pages[0], layer.weights.subtract_max) is None
    assert len(calls) - before == suited


def install():
    """Put the stand-in in xformers' place and take float32."""
    fmha.memory_efficient_attention_partial = attention
    xformers_prefill.DTYPES = (torch.float32, torch.float16, torch.bfloat16)
