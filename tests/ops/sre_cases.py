"""Random self-recall-error problems on poisoned, strided memory, and their exact answers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lola_vllm import reference

# Inputs in bfloat16 are widened exactly and all sums are float32, so it needs no more room.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 2e-5}


@dataclass
class SreCase:
    """Arguments of `sre_scores`."""

    k: Tensor
    v: Tensor
    feature_map_k: Tensor
    H: Tensor
    s: Tensor
    slots: Tensor
    empty: Tensor

    def args(self) -> tuple[Tensor, ...]:
        return (self.k, self.v, self.feature_map_k, self.H, self.s, self.slots, self.empty)

    def rows(self, index: Tensor) -> SreCase:
        """The same problem with only some rows, over the same pages."""
        return replace(
            self,
            k=self.k[index],
            v=self.v[index],
            slots=self.slots[index],
            empty=self.empty[index],
        )

    def candidates(self, index: Tensor) -> SreCase:
        return replace(self, k=self.k[:, :, index], v=self.v[:, :, index])

    def reference(self) -> Tensor:
        """`[B, Hg, E]` in float64, from `lola_vllm.reference`, one row and sparse set at a time."""
        B, Hg, E, _ = self.k.shape
        Hs = self.feature_map_k.shape[0]
        share = Hs // Hg
        scores = torch.empty(B, Hg, E, dtype=torch.float64)
        for row in range(B):
            k = self.k[row].double().repeat_interleave(share, dim=0)
            v = self.v[row].double().repeat_interleave(share, dim=0)
            phi = reference.feature_map(k, self.feature_map_k.double())
            page = int(self.slots[row])
            if self.empty[row]:
                H, s = torch.zeros(self.H.shape[1:]), torch.zeros(self.s.shape[1:])
            else:
                H, s = self.H[page], self.s[page]
            for group in range(Hg):
                heads = list(range(group * share, (group + 1) * share))
                scores[row, group] = reference._scores(
                    phi, v, H.double(), s.double(), heads, list(range(E))
                )
        return scores


def make_case(
    *,
    B: int = 3,
    Hg: int = 2,
    share: int = 1,
    E: int = 33,
    d: int = 16,
    F: int = 40,
    dtype: torch.dtype = torch.float32,
    slot_dtype: torch.dtype = torch.int64,
    scale: float = 1.0,
    with_empty: bool = True,
    seed: int = 0,
) -> SreCase:
    """Each row's state holds 50 random pairs; `scale` multiplies k, so the features' logits.

    Everything that must not be read is NaN: pages no row uses, the page of the last row where that
    is marked empty (B > 1), the gaps between pages, and the gaps between candidates.
    """
    gen = torch.Generator().manual_seed(seed)
    Hs, pages = Hg * share, B + 2
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    def strided(x: Tensor) -> Tensor:
        """x with gaps of NaN after every row and every set of rows."""
        room = torch.full(
            (*x.shape[:-2], x.shape[-2] + 2, x.shape[-1] + 3), torch.nan, dtype=x.dtype
        )
        view = room[..., : x.shape[-2], : x.shape[-1]]
        return view.copy_(x)

    k, v = randn(B, Hg, E, d) * scale, randn(B, Hg, E, d)
    feature_map_k = (randn(Hs, d, F) * d**-0.5).to(dtype)
    H_size, s_size = Hs * 2 * F * d, Hs * 2 * F
    pool = torch.full((pages, H_size + s_size + 5), torch.nan, dtype=state_dtype)
    H = pool[:, :H_size].unflatten(1, (Hs, 2 * F, d))
    s = pool[:, H_size : H_size + s_size].unflatten(1, (Hs, 2 * F))
    slots = torch.randperm(pages, generator=gen)[:B].to(slot_dtype)
    empty = torch.zeros(B, dtype=torch.bool)
    empty[-1] = with_empty and B > 1
    for row in range(B):
        if not empty[row]:
            phi = reference.feature_map(randn(Hs, 50, d) * scale, feature_map_k.double())
            H[slots[row]] = (phi.mT @ randn(Hs, 50, d)).to(state_dtype)
            s[slots[row]] = phi.sum(1).to(state_dtype)
    return SreCase(
        strided(k.to(dtype)), strided(v.to(dtype)), feature_map_k, H, s, slots, empty
    )  # fmt: skip


def assert_scores(actual: Tensor, case: SreCase, rtol: float | None = None) -> None:
    """The scores match the reference, and none is NaN."""
    tolerance = TOLERANCE[case.k.dtype] if rtol is None else rtol
    torch.testing.assert_close(
        actual.double(), case.reference(), rtol=tolerance, atol=tolerance, equal_nan=False
    )
