"""RoPE of any decoder of transformers, asked of the decoder's own functions.

LoLA's ops take heads whose numbers i and i + d / 2 turn together. Families differ: some turn a part
of a head only, some turn neighbours, and some layers turn nothing. A permutation of the numbers of
queries and keys brings all to the one form, and changes no product of a query and a key. Numbers
that do not turn have an angle of 0.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lola_vllm.core.lola_config import SEVERAL_TABLES, LolaConfigError, no_one_table


@dataclass(frozen=True, eq=False)
class HeadOrder:
    """How the heads of a layer come to the form that LoLA's ops take.

    Attributes:
        order: `[d]` int64, which number of a head is at each place; None: they are in order.
        width: R, how many numbers turn; 0 in a layer without RoPE.
        interleaved: whether neighbours turn together, and not i and i + R / 2.
    """

    order: Tensor | None
    width: int
    interleaved: bool

    def __call__(self, x: Tensor) -> Tensor:
        """Queries or keys `[..., d]` in that form."""
        return x if self.order is None else x[..., self.order.to(x.device)]


def on_host(rotary: nn.Module, config: Any) -> nn.Module:
    """A decoder's RoPE made again in host memory: its own may be without numbers yet.

    Args:
        config: of the decoder.
    """
    with torch.device("cpu"):
        made: nn.Module = type(rotary)(config)
    return made


def head_orders(
    attentions: Sequence[nn.Module], rotary: nn.Module, head_dim: int
) -> list[HeadOrder]:
    """`head_order` of each of a decoder's layers; those that turn alike share one."""
    known: dict[tuple[bool, str | None], HeadOrder] = {}
    kinds = [(turns(attention), _layer_type(attention, rotary)) for attention in attentions]
    for attention, kind in zip(attentions, kinds, strict=True):
        if kind not in known:
            known[kind] = head_order(attention, rotary, head_dim)
    return [known[kind] for kind in kinds]


def head_order(attention: nn.Module, rotary: nn.Module, head_dim: int) -> HeadOrder:
    """How a layer turns its heads, by a trial on unit vectors.

    Args:
        attention: a layer's attention, `model.layers[i].self_attn`. rotary: the model's RoPE,
            `model.rotary_emb`.
    """
    if not turns(attention):
        return HeadOrder(None, 0, False)
    with torch.device("cpu"):
        cos, sin = angles(attention, rotary, torch.tensor([1]), torch.float32)
        width = cos.shape[-1] * (1 if _repeats(sin[0]) else 2)
        unit = torch.zeros(width)
        unit[0] = 1
        turned = _apply(attention, unit.expand(1, -1), cos, sin)[0]
        interleaved = width > 2 and bool(turned[1] != 0)
        if width == head_dim and not interleaved:
            return HeadOrder(None, width, False)
        one, two = _pairs(width, interleaved)
        rest = torch.arange(width, head_dim)
        half = len(rest) // 2
        return HeadOrder(torch.cat([one, rest[:half], two, rest[half:]]), width, interleaved)


def turns(attention: nn.Module) -> bool:
    """Whether a layer has RoPE. Some layers of SmolLM3 and of Cohere 2 have none: there a condition
    stands before the call, which the layer itself answers."""
    kind: Any = type(attention)
    condition = _condition(kind)
    return condition is None or bool(eval(condition, {"self": attention}))


@functools.cache  # reading a source takes a millisecond
def _condition(kind: Any) -> str | None:
    source = inspect.getsource(kind.forward)
    found = re.search(r"if (.+):\n\s+query_states, key_states = apply_rotary_pos_emb", source)
    return found and found[1]


def _layer_type(attention: nn.Module, rotary: nn.Module) -> str | None:
    """What a decoder's RoPE is told of a layer; None where it is the same for all."""
    if not hasattr(rotary, "layer_types"):
        return None
    config: Any = attention.config
    return str(config.layer_types[attention.layer_idx])


def table(
    attention: nn.Module,
    rotary: nn.Module,
    order: HeadOrder,
    head_dim: int,
    positions: Sequence[int],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """cos and sin `[n, d / 2]` of a layer's heads in LoLA's form, for `KeyRotation.of_table`.

    Raises:
        LolaConfigError: RoPE has several tables, by the length of a context.
    """
    kind: Any = getattr(rotary, "rope_type", "default")
    if isinstance(kind, dict):
        kind = kind[_layer_type(attention, rotary)]
    if kind in SEVERAL_TABLES:
        raise no_one_table(f"rope_type {kind!r}")
    n, half = len(positions), head_dim // 2
    found = torch.ones(n, half, dtype=dtype), torch.zeros(n, half, dtype=dtype)
    if order.width:
        cos, sin = angles(attention, rotary, torch.tensor(list(positions)), dtype)
        one, two = _pairs(order.width, order.interleaved)
        unit = torch.zeros(n, order.width, dtype=dtype)
        unit[:, one] = 1
        turned = _apply(attention, unit, cos, sin)
        found[0][:, : len(one)], found[1][:, : len(one)] = turned[:, one], turned[:, two]
    return found


def check_one(tables: int) -> None:
    """Raise `LolaConfigError` where layers of a model turn keys by several tables."""
    if tables > 1:
        raise LolaConfigError(
            "RoPE differs from layer to layer in this model: its states are not composed, and it "
            "has no library; read documents in a row"
        )


def angles(
    attention: nn.Module, rotary: nn.Module, positions: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin `[n, R]` as the model's RoPE gives them to a layer for positions `[n]`, in host
    memory; `[n, R / 2]` where a column is of a pair (`_repeats`)."""
    buffers = [b for b in rotary.buffers() if not b.is_meta]
    device = buffers[0].device if buffers else torch.device("cpu")
    like = torch.empty(1, dtype=dtype, device=device)
    cos, sin = embeddings(attention, rotary, like, positions[None].to(device))
    return cos[0].cpu(), sin[0].cpu()


def embeddings(
    attention: nn.Module, rotary: nn.Module, x: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """What a decoder gives a layer beside its input x: cos and sin `[B, n, R]` in x's dtype.

    Args:
        positions: `[B, n]`.
    """
    kind = _layer_type(attention, rotary)
    made: tuple[Tensor, Tensor] = rotary(x, positions, *([] if kind is None else [kind]))
    return made


def _repeats(sin: Tensor) -> bool:
    """Whether a table has a column for each number of a head that turns; gpt-oss's has one for both
    numbers of a pair."""
    one, two = sin.chunk(2)
    return torch.equal(one, two) or torch.equal(sin[::2], sin[1::2])


def _pairs(width: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    """The first and the second number of each pair that turns together."""
    numbers = torch.arange(width)
    both = (numbers[::2], numbers[1::2]) if interleaved else numbers.chunk(2)
    return both[0], both[1]


def _apply(attention: nn.Module, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    apply: Any = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    heads = x[None, None]
    turned: Tensor = apply(heads, heads, cos[None], sin[None])[0][0, 0]
    return turned
