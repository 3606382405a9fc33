"""Saliency: how much a pair will be read from afar, told from the pair alone.

The self-recall error says what the hidden state cannot recall. It does not say what will be asked
for. Saliency is a linear estimate, per KV head, of the log of the largest attention that a token
gets from queries more than `DISTANCE` tokens later (`docs/algorithm.md`, section 3). Its features
are the lengths of the key's rotary pairs, which do not depend on the position, and the value.

The estimate is a ridge regression on plain text. Only sums over tokens are kept, so memory does not
grow with the text.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lola_vllm.eval.repeats import DISTANCE

# Attention below this is as good as none; its log would rule the fit.
LEAST_ATTENTION = 1e-5
# First tokens of a window draw attention whatever they are.
SKIPPED_TOKENS = 4
# Penalty on standardized features, as a share of the number of tokens.
RIDGE = 0.05
# Every so many windows one is left out of the fit that is judged.
JUDGED_ONE_IN = 5


def far_attention(weights: Tensor, num_kv_heads: int) -> Tensor:
    """The largest attention that each token gets from far behind.

    Args:
        weights: `[Hq, T, T]`, softmax attention, queries in dim 1.

    Returns:
        `[Hkv, T]`, over the queries more than `DISTANCE` tokens later and the heads of a group.
    """
    T = weights.shape[-1]
    tokens = torch.arange(T, device=weights.device)
    near = tokens[:, None] - tokens <= DISTANCE
    far = weights.masked_fill(near, 0).amax(1)  # [Hq, T]
    return far.unflatten(0, (num_kv_heads, -1)).amax(1)


def features(k: Tensor, v: Tensor) -> Tensor:
    """What saliency is linear in: `[..., d]` each -> `[..., d // 2 + d]`."""
    half = k.shape[-1] // 2
    return torch.cat([torch.hypot(k[..., :half], k[..., half : 2 * half]), v], dim=-1)


class _Sums:
    """Sums over tokens of the products of features, targets and 1, per KV head, in float64."""

    def __init__(self, heads: int, width: int) -> None:
        self.products = torch.zeros(heads, width, width, dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """x: `[tokens, heads, width]`; its last two columns are the target and 1."""
        x = x.transpose(0, 1).double()
        self.products += x.mT @ x

    def moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """Number of tokens `[heads]`, means `[heads, width]`, covariance of features and target."""
        n = self.products[:, -1, -1]
        mean = self.products[:, -1] / n[:, None]
        covariance = self.products / n[:, None, None] - mean[:, :, None] * mean[:, None]
        return n, mean[:, :-1], covariance[:, :-1, :-1]


class SaliencyFit:
    """The regression of one layer."""

    def __init__(self) -> None:
        self._windows = 0
        self._fitted: _Sums | None = None
        self._judged: _Sums | None = None

    def add(self, k: Tensor, v: Tensor, weights: Tensor) -> None:
        """Read a window.

        Args:
            k: `[Hkv, T, d]`, after RoPE. v: `[Hkv, T, d]`. weights: `[Hq, T, T]`.
        """
        T = k.shape[1]
        stop = T - DISTANCE - T // 24  # so that each token has queries far behind it
        if stop <= SKIPPED_TOKENS:
            return
        target = far_attention(weights, len(k)).clamp(min=LEAST_ATTENTION).log().unsqueeze(-1)
        rows = torch.cat([features(k, v), target, torch.ones_like(target)], dim=-1)
        rows = rows[:, SKIPPED_TOKENS:stop].transpose(0, 1)
        if self._fitted is None or self._judged is None:
            self._fitted, self._judged = (_Sums(len(k), rows.shape[-1]) for _ in range(2))
        self._windows += 1
        (self._judged if self._windows % JUDGED_ONE_IN == 0 else self._fitted).add(rows)

    @property
    def judgeable(self) -> bool:
        """Whether enough windows were read to fit and to judge."""
        return self._windows >= JUDGED_ONE_IN

    def correlation(self) -> list[float]:
        """Per KV head, of estimate and log attention, on windows that the fit did not see."""
        assert self._fitted is not None and self._judged is not None
        slopes, _ = _ridge(self._fitted)
        _, _, covariance = self._judged.moments()
        along = (slopes * covariance[:, :-1, -1]).sum(-1)
        spread = torch.einsum("hi,hij,hj->h", slopes, covariance[:, :-1, :-1], slopes)
        return (along / (spread * covariance[:, -1, -1]).clamp(min=1e-30).sqrt()).tolist()

    def weights(self) -> Tensor:
        """A layer's saliency tensor, `[Hkv, d // 2 + d + 1]` float32, fitted to all windows.

        The last column makes the mean of the log of the weight zero.
        """
        assert self._fitted is not None and self._judged is not None
        both = _Sums(*self._fitted.products.shape[:2])
        both.products = self._fitted.products + self._judged.products
        slopes, offset = _ridge(both)
        return torch.cat([slopes, offset], dim=-1).float()


def _ridge(sums: _Sums) -> tuple[Tensor, Tensor]:
    """Slopes `[heads, features]` and offset `[heads, 1]` such that the estimates' mean is 0."""
    _, mean, covariance = sums.moments()
    scale = covariance.diagonal(dim1=1, dim2=2).clamp(min=1e-8).sqrt()[:, :-1]
    among = covariance[:, :-1, :-1] / (scale[:, :, None] * scale[:, None])
    with_target = (covariance[:, :-1, -1] / scale).unsqueeze(-1)
    ridge = RIDGE * torch.eye(among.shape[-1], dtype=among.dtype)
    slopes = torch.linalg.solve(among + ridge, with_target).squeeze(-1) / scale
    return slopes, -(slopes * mean[:, :-1]).sum(-1, keepdim=True)
