"""The Triton back end: `decode` and `prefill` as `lola_vllm.core.ops.contract` wants them.

Both only launch kernels. What is due, empty or padding is decided on the device, so nothing waits
for it; decode's launches depend on shapes alone, and a CUDA graph can replay them.
"""

from __future__ import annotations

from torch import Tensor

from lola_vllm.core.ops.contract import DecodeBatch, LayerState, PrefillBatch
from lola_vllm.kernels import decode as decode_kernels
from lola_vllm.kernels import prefill as prefill_kernels
from lola_vllm.kernels.layer import check
from lola_vllm.kernels.prefill import SoftmaxPart
from lola_vllm.kernels.splits import choose_splits
from lola_vllm.kernels.update import scratch_buffers, update


def decode(
    layer: LayerState,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    batch: DecodeBatch,
    out: Tensor,
    splits: int | None = None,
) -> None:
    """One new token per row; see `contract.DecodeOp`.

    Args:
        splits: parts that a row's pairs are cut into; None: as many as fill the GPU.

    Raises:
        ValueError: a shape, dtype, stride or device that does not fit; names the argument.
    """
    check(layer, q, k, v, out)
    B = len(q)
    for name, tensor in batch._asdict().items():
        if tensor.shape != (B,):
            raise ValueError(f"{name}: shape {list(tensor.shape)}, expected [{B}]")
    if B == 0:
        return
    splits = splits or choose_splits(layer.layout, B, q.device)
    parts = decode_kernels.attend(layer, q, k, v, batch, out, splits)
    update(layer, *batch, scratch_buffers(layer.layout, B, q.device), parts)


def prefill(
    layer: LayerState,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    batch: PrefillBatch,
    out: Tensor,
    softmax: SoftmaxPart | None = None,
    apart: bool | None = None,
) -> None:
    """A segment of new tokens per row, from an empty or a live page; see `contract.PrefillOp`.

    Args:
        softmax: what attends chunk, window and sinks (`prefill.prefill`); None: Triton.
        apart: as of `prefill.prefill`.

    Raises:
        ValueError: a shape, dtype, stride or device that does not fit; names the argument.
    """
    check(layer, q, k, v, out)
    R = len(batch.state_indices)
    for name, size in (("query_start_loc", R + 1), ("context_lens", R)):
        tensor: Tensor = getattr(batch, name)
        if tensor.shape != (size,):
            raise ValueError(f"{name}: shape {list(tensor.shape)}, expected [{size}]")
        if tensor.device.type != "cpu":
            raise ValueError(f"{name}: on {tensor.device}, must be in host memory")
    prefill_kernels.prefill(layer, q, k, v, batch, out, softmax, apart)
