"""A storm of requests on an engine in this process: arrivals, aborts, retries, poisoned memory.

Every answer that is completed must be that of its request alone, nothing may be written to a state
that nobody holds, and afterwards every block must be free.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm import LLM, SamplingParams, TokensPrompt
from vllm.sampling_params import RequestOutputKind
from vllm.v1.request import RequestStatus

from tests.support.engine import GREEDY, block_pool, metric, pages, scheduler, state_manager

NAN = -1  # all bits set: NaN in every float type


@dataclass
class Sent:
    """A request on its way: its prompt's number, the tokens it asks for, and its inner name."""

    prompt: int
    tokens: int
    copies: int
    inner: str


@dataclass
class Report:
    """What happened."""

    steps: int = 0
    completed: int = 0
    most_waiting_steps: int = 0
    seen: Counter[str] = field(default_factory=Counter)


class Storm:
    """Random requests for `prompts`, whose answers alone are `expected`."""

    def __init__(
        self,
        llm: LLM,
        prompts: list[list[int]],
        expected: list[list[int]],
        seed: int,
        same: Callable[[int, list[int]], bool] | None = None,
    ) -> None:
        self.llm, self.core = llm, llm.llm_engine
        self.prompts, self.expected = prompts, expected
        self.random = random.Random(seed)
        self.same = same
        self.live: dict[str, Sent] = {}
        self.report = Report()
        self._number = 0
        self._quiet_steps = 0

    def run(self, steps: int) -> Report:
        """So many steps with arrivals and aborts, then until nothing is left."""
        with self._poisoned():
            for _ in range(steps):
                self._disturb()
                self._step()
            while self.core.has_unfinished_requests():
                self._step()
        assert not self.live
        self._assert_idle()
        return self.report

    def _disturb(self) -> None:
        rng, seen = self.random, self.report.seen
        if len(self.live) < 24 and rng.random() < 0.3:
            for _ in range(rng.choice([1, 1, 2, 6])):
                self._send(rng.randrange(len(self.prompts)))
        if self.live and rng.random() < 0.15:
            phases: dict[str, list[str]] = {}
            for name, sent in self.live.items():
                phases.setdefault(self._phase(sent), []).append(name)
            when = rng.choice(sorted(phases))
            for name in phases[when][: rng.choice([1, 1, 3])]:
                sent = self.live.pop(name)
                seen[f"aborted {when}"] += 1
                self.core.abort_request([name])
                if rng.random() < 0.5:  # the client tries again at once
                    self._send(sent.prompt)
                    seen["retried"] += 1

    def _send(self, prompt: int) -> None:
        rng = self.random
        name, self._number = f"r{self._number}", self._number + 1
        tokens = rng.randint(1, len(self.expected[prompt]))
        copies = 2 if rng.random() < 0.1 else 1
        # Copies must be sampled; of one token there is nothing to choose from.
        sampling = {"n": copies, "temperature": 0.5, "top_k": 1} if copies > 1 else {}
        inner = self.core.add_request(
            name,
            TokensPrompt(prompt_token_ids=self.prompts[prompt]),
            SamplingParams(
                output_kind=RequestOutputKind.FINAL_ONLY,
                **{**GREEDY, "max_tokens": tokens, **sampling},
            ),
            priority=rng.randint(0, 3),
        )
        self.live[name] = Sent(prompt, tokens, copies, inner)

    def _phase(self, sent: Sent) -> str:
        inner = sent.inner if sent.copies == 1 else f"0_{sent.inner}"
        request = scheduler(self.llm).requests.get(inner)
        if request is None:
            return "with a copy finished"
        if request.status == RequestStatus.PREEMPTED:
            return "while preempted"
        if request.num_output_tokens:
            return "in decode"
        return "in prefill" if request.num_computed_tokens else "while waiting"

    def _step(self) -> None:
        finished = [output for output in self.core.step() if output.finished]
        for output in finished:
            sent = self.live.pop(output.request_id)
            assert len(output.outputs) == sent.copies
            for answer in output.outputs:
                tokens = list(answer.token_ids)
                if tokens != self.expected[sent.prompt][: sent.tokens]:
                    assert len(tokens) == sent.tokens
                    assert self.same and self.same(sent.prompt, tokens), (
                        f"request {output.request_id}, prompt {sent.prompt}: {tokens}, alone "
                        f"{self.expected[sent.prompt][: sent.tokens]}"
                    )
                    self.report.seen["ties"] += 1
            self.report.completed += 1
        report = self.report
        report.steps += 1
        self._quiet_steps = 0 if finished or not self.live else self._quiet_steps + 1
        report.most_waiting_steps = max(report.most_waiting_steps, self._quiet_steps)
        # The longest request alone takes fewer steps than this, however small the pieces.
        assert self._quiet_steps < 400, "requests wait, and none is completed: livelock"
        manager = state_manager(self.llm)
        assert 0 <= manager.num_states_in_use <= manager.num_states

    @contextmanager
    def _poisoned(self) -> Iterator[None]:
        """Between planning and computing each step, fill what nobody holds with NaN or with the
        state of another request; after the step it must be there still."""
        plan = scheduler(self.llm)
        schedule, update = plan.schedule, plan.update_from_output
        pool, layers = block_pool(self.llm), pages(self.llm)
        poison: dict[str, Any] = {}

        def planned(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            held = [b.block_id for b in pool.blocks if b.ref_cnt > 0 and not b.is_null]
            free = [
                b.block_id
                for b in pool.blocks
                if b.is_null or (b.ref_cnt == 0 and b.block_hash is None)
            ]
            source = self.random.choice(held) if held and self.random.random() < 0.5 else None
            for layer in layers:
                layer[free] = NAN if source is None else layer[source].clone()
            poison["free"] = free
            poison["bytes"] = [layer[free[0]].clone() for layer in layers]
            self.report.seen["pages poisoned"] += len(free)
            return output

        def computed(*args: Any, **kwargs: Any) -> Any:
            for layer, page in zip(layers, poison["bytes"], strict=True):
                assert torch.equal(layer[poison["free"]], page.expand(len(poison["free"]), -1))
            return update(*args, **kwargs)

        plan.schedule, plan.update_from_output = planned, computed
        try:
            yield
        finally:
            plan.schedule, plan.update_from_output = schedule, update

    def _assert_idle(self) -> None:
        manager, plan = state_manager(self.llm), scheduler(self.llm)
        assert manager.num_states_in_use == 0
        assert block_pool(self.llm).get_num_free_blocks() == manager.num_states
        assert all(b.ref_cnt == 0 for b in block_pool(self.llm).blocks if not b.is_null)
        assert not plan.requests and not plan.running and not plan.waiting
        assert not manager.req_to_blocks and not manager.num_cached_block
        for name in ("last_state_block_idx", "_num_retired_blocks", "_allocated_block_reqs"):
            assert not getattr(manager, name, None), name
        seen = self.report.seen
        seen["preempted"] = int(metric(self.llm, "vllm:num_preemptions"))
        seen["prefix hit tokens"] = int(metric(self.llm, "vllm:prefix_cache_hits"))
