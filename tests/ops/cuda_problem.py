"""Problems on the CUDA sources' decode and update, emulated or on a device (conftest.py)."""

from dataclasses import replace

import torch
from problem import assert_state_matches, poisoned_pool

from lola_vllm.ops import portable

TOLERANCE = {
    torch.float32: {"rtol": 1e-4, "atol": 1e-4},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
    torch.float16: {"rtol": 3e-3, "atol": 3e-3},
}


def decode(q, k, v, weights, layout, views, slots, seq_lens, out):
    """`contract.DecodeOp` on the CUDA sources."""
    op = torch.ops.lola.decode if q.is_cuda else torch.ops.lola_emulated.decode
    op(
        q, k, v, weights.feature_map_q, weights.feature_map_k, weights.log_gate, *views, slots,
        seq_lens, out, weights.subtract_max, layout.window_size, layout.update_interval,
        layout.sink_size,
    )  # fmt: skip


def to_device(problem, device):
    names = ("q", "k", "v", "feature_map_q", "feature_map_k", "window_factors")
    return replace(problem, **{name: getattr(problem, name).to(device) for name in names})


def pool(layout, num_pages, device, extra_stride=0):
    """A pool of NaN pages on the device, and its views."""
    pages, _ = poisoned_pool(layout, num_pages, extra_stride)
    pages = pages.to(device)
    return pages, layout.views(pages)


def run(problem, device, *, slot=2, decode_from=0, extra_stride=0):
    """Decode a sequence token by token, after a prefill by the portable ops.

    Returns out, layout and views on the CPU.
    """
    problem = to_device(problem, device)
    layout, weights = problem.layout(), problem.weights()
    pages, views = pool(layout, 4, device, extra_stride)
    out = torch.full_like(problem.q, torch.nan)
    slots = torch.tensor([slot], dtype=torch.int32, device=device)
    if decode_from:
        portable.prefill(
            problem.q[:decode_from], problem.k[:decode_from], problem.v[:decode_from], weights,
            layout, views, slots, torch.tensor([0, decode_from]), torch.tensor([0]),
            out[:decode_from],
        )  # fmt: skip
    for t in range(decode_from, len(problem.q)):
        decode(
            problem.q[t : t + 1], problem.k[t : t + 1], problem.v[t : t + 1], weights, layout,
            views, slots, torch.tensor([t + 1], dtype=torch.int32, device=device), out[t : t + 1],
        )  # fmt: skip
    pages = pages.cpu()
    for page in {0, 1, 2, 3} - {slot}:
        assert (pages[page] == 0xFF).all()
    assert (pages[slot, layout.page_bytes :] == 0xFF).all()
    return out.cpu(), layout, layout.views(pages)


def portable_page(problem, layout):
    """Views of a pool whose page 2 is the portable ops', which compute every score."""
    _, views = poisoned_pool(layout, 4)
    portable.prefill(
        problem.q, problem.k, problem.v, problem.weights(), layout, views, torch.tensor([2]),
        torch.tensor([0, len(problem.q)]), torch.tensor([0]), torch.empty_like(problem.q),
    )  # fmt: skip
    return views


def check(problem, device, **options):
    """Outputs and state are the reference's."""
    out, layout, views = run(problem, device, **options)
    tolerance = TOLERANCE[problem.q.dtype]
    torch.testing.assert_close(out.double(), problem.reference()[0], **tolerance)
    # Sums are made in float32 from the same rounded inputs, whatever the dtype of the model.
    slot, state = options.get("slot", 2), TOLERANCE[torch.float32]
    assert_state_matches(problem, layout, views, slot, len(problem.q), **state)
