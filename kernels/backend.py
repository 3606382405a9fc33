"""The Triton back end: `decode` and `prefill` as `lola_vllm.ops.contract` wants them.

Both only launch kernels. What is due, empty or padding is decided on the device, so nothing waits
for it; decode's launches depend on shapes alone, and a CUDA graph can replay them.
"""

from __future__ import annotations

from torch import Tensor

from lola_vllm.kernels import decode as decode_kernels
from lola_vllm.kernels import prefill as prefill_kernels
from lola_vllm.kernels.common import check
from lola_vllm.kernels.prefill import SoftmaxPart
from lola_vllm.kernels.update import scratch_buffers, update
from lola_vllm.ops.contract import LolaWeights
from lola_vllm.state import StateLayout, StateViews


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: LolaWeights,
    layout: StateLayout,
    views: StateViews,
    slots: Tensor,
    seq_lens: Tensor,
    out: Tensor,
    splits: int | None = None,
) -> None:
    """One new token per row; see `contract.DecodeOp`.

    Args:
        splits: parts that a row's pairs are cut into; None: as many as fill the GPU.

    Raises:
        ValueError: a shape, dtype, stride or device that does not fit; names the argument.
    """
    strides = check(q, k, v, weights, layout, views, out)
    B = len(q)
    if slots.shape != (B,) or seq_lens.shape != (B,):
        raise ValueError(
            f"slots, seq_lens: shapes {list(slots.shape)} and {list(seq_lens.shape)}, "
            f"expected [{B}]"
        )
    if B == 0:
        return
    splits = splits or decode_kernels.choose_splits(layout, B, q.device)
    decode_kernels.attend(q, k, v, weights, layout, views, slots, seq_lens, out, strides, splits)
    scratch = scratch_buffers(layout, B, q.device)
    update(weights.feature_map_k, layout, views, slots, seq_lens, 0, B, scratch, strides)


def prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: LolaWeights,
    layout: StateLayout,
    views: StateViews,
    slots: Tensor,
    query_start_loc: Tensor,
    context_lens: Tensor,
    out: Tensor,
    softmax: SoftmaxPart | None = None,
) -> None:
    """A run of new tokens per row, from an empty or a live page; see `contract.PrefillOp`.

    Args:
        softmax: what attends piece, window and sinks (`prefill.prefill`); None: Triton too.

    Raises:
        ValueError: a shape, dtype, stride or device that does not fit; names the argument.
    """
    strides = check(q, k, v, weights, layout, views, out)
    R = len(slots)
    if query_start_loc.shape != (R + 1,) or context_lens.shape != (R,):
        raise ValueError(
            f"query_start_loc, context_lens: shapes {list(query_start_loc.shape)} and "
            f"{list(context_lens.shape)}, expected [{R + 1}] and [{R}]"
        )
    for name, tensor in (("query_start_loc", query_start_loc), ("context_lens", context_lens)):
        if tensor.device.type != "cpu":
            raise ValueError(f"{name}: on {tensor.device}, must be in host memory")
    prefill_kernels.prefill(
        q, k, v, weights, layout, views, slots, query_start_loc, context_lens, out, strides,
        softmax,
    )  # fmt: skip
