"""Speculative decoding: drafts that a state takes back by its count.

A step checks drafts one behind the other by the op that decodes, in each layer, so that answers and
states are those without drafts to the last bit. Where no update, context shift or block boundary
lies among them, they are rows of the ring alone, and what is rejected is overwritten by the next
tokens (`core/ops/rollback.py`). So drafts are cut there, and a sequence has no further states.

The scheduler cuts them: it alone knows how many tokens of a request are confirmed when it plans the
next step. `config_hook` chooses this class, as `--scheduler-cls` would, and no scheduling ahead of
results, under which that number is a guess.

Wrong drafts cost as much as right ones: with four of them a step has five rows for one. So where
all of a request's drafts were rejected it has one at a time, and then one in 2, 4, 8 to 64 tokens,
until one is accepted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from vllm.v1.core.sched.scheduler import Scheduler

from lola_vllm.core.ops.rollback import longest_draft
from lola_vllm.core.ops.shift_schedule import ShiftSchedule
from lola_vllm.engine.vllm.cache import lola_hf_config, sequence_layout

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.outputs import DraftTokenIds
    from vllm.v1.request import Request

LONGEST_PAUSE = 64  # tokens between two drafts that are rejected: a cost of a few percent


@dataclass(frozen=True)
class Rejections:
    """Drafts of a request of which no token was accepted.

    Attributes:
        count: in a row. until: the number of known tokens from which the next draft is checked.
    """

    count: int = 0
    until: int = 0

    def longest(self, num_tokens: int) -> int:
        """How many drafts are checked by a request that knows so many tokens: one, or none."""
        return int(num_tokens >= self.until)

    def one_more(self, num_tokens: int) -> Rejections:
        """After another one, by a request that knows so many tokens: pauses of 0, 1, 3, 7, ..."""
        pause = min(2**self.count, LONGEST_PAUSE) - 1
        return Rejections(self.count + 1, num_tokens + 1 + pause)


class LolaScheduler(Scheduler):
    """vLLM's scheduler with drafts of such lengths that a state takes them back."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._longest = longest_of(self.vllm_config)
        self._rejections: WeakKeyDictionary[Request, Rejections] = WeakKeyDictionary()
        # A last token of a prompt would be filled up with drafts of no token, to the shape of a
        # CUDA graph, unless the number of drafts follows the size of the batch.
        if self.dynamic_sd_lookup is None:
            self.dynamic_sd_lookup = [self.num_spec_tokens] * (self.max_num_running_reqs + 1)

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        """Take the drafts of a step for the next, as many as a state takes back."""
        super().update_draft_token_ids(draft_token_ids)
        for name in draft_token_ids.req_ids:
            request = self.requests.get(name)
            if request is not None and request.spec_token_ids:
                longest = self._longest(request.num_tokens)
                if rejections := self._rejections.get(request):
                    longest = min(longest, rejections.longest(request.num_tokens))
                request.spec_token_ids = request.spec_token_ids[:longest]

    def make_spec_decoding_stats(self, *args: Any, **kwargs: Any) -> Any:
        """Count drafts, as vLLM does for each request of a step that had one."""
        request = self.requests[kwargs["request_id"]]
        if kwargs["num_accepted_tokens"]:
            self._rejections.pop(request, None)
        else:
            before = self._rejections.get(request, Rejections())
            self._rejections[request] = before.one_more(request.num_tokens)
        return super().make_spec_decoding_stats(*args, **kwargs)

    def _update_request_with_output(
        self, request: Request, new_token_ids: list[int], is_stale: bool = False
    ) -> tuple[list[int], bool]:
        """Take the tokens of a step; a request that ends among accepted drafts goes back to it."""
        tokens, stopped = super()._update_request_with_output(request, new_token_ids, is_stale)
        if stopped:
            known = request.num_tokens - 1  # the newest is never computed
            request.num_computed_tokens = min(request.num_computed_tokens, known)
        return tokens, stopped


def longest_of(vllm_config: VllmConfig) -> Callable[[int], int]:
    """`longest_draft` of a model, by the number of known tokens."""
    cache = vllm_config.cache_config
    return functools.partial(
        longest_draft,
        interval=sequence_layout(vllm_config).page.update_interval,  # that of all layers
        schedule=ShiftSchedule.of(lola_hf_config(vllm_config)),
        block_size=cache.mamba_block_size if cache.enable_prefix_caching else None,
    )
