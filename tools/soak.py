"""Load a server for minutes with random requests of which many are abandoned, and watch it.

    python -m tools.soak --minutes 30 --out soak.json

Starts `lola-vllm serve` on a tiny random model (or `--model`). Several clients stream answers of
random prompts; some leave while the prompt is computed, some in the middle of the answer, some ask
the same again. At the end of each interval the clients pause until the server is idle, and memory
and states are read. It fails when memory grows, a state is lost, answers become slower, or a
request whose answer is known is answered otherwise.

Memory is RssAnon + VmSwap of the server's processes: what they have allocated, wherever it lies.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import psutil

from lola_vllm.evaluation import summary
from tools.support.memory import memory_mib
from tools.support.server_process import Server, serving
from tools.support.speaking import make_speaking, serve_speaking

NAME = "soaked"
IDLE_LIMIT_S = 60
MARGIN = 0.02  # of log-probabilities: below it, another batch may turn a greedy choice


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="default: a tiny random one, made here")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--interval", type=float, default=60, help="seconds of load per sample")
    parser.add_argument("--warm-up", type=float, default=60, help="seconds before the first")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--pause", type=float, default=0, help="mean seconds between its requests")
    parser.add_argument(
        "--primitive-cache",
        type=int,
        default=0,
        help="entries of oneDNN's cache in the server; it grows with every new number of tokens in "
        "a step until it is full (1024 by default), and would hide or feign a leak",
    )
    parser.add_argument("--longest", type=int, default=1500, help="tokens of a prompt, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--growth-mib", type=float, default=32, help="what memory may grow by")
    parser.add_argument("--drift", type=float, default=2, help="by what factor p99 may grow")
    parser.add_argument("--out", type=Path)
    return parser.parse_args(argv)


class Soak:
    """Clients of one server, and what they and the server's processes go through."""

    def __init__(self, server: Server, args: argparse.Namespace, headers: dict[str, str]) -> None:
        self.server, self.args = server, args
        self.random = random.Random(args.seed)
        self.http = httpx.AsyncClient(base_url=server.url, timeout=300, headers=headers)
        self.open = asyncio.Event()
        self.busy = 0
        self.stopped = False
        self.known: list[tuple[list[int], str]] = []
        self.recent: list[list[int]] = []
        self.seen: Counter[str] = Counter()
        self.first_token: list[float] = []
        self.next_token: list[float] = []
        self.faults: list[str] = []

    async def run(self) -> dict[str, Any]:
        """The whole soak: samples, totals and faults."""
        await self._learn()
        clients = [asyncio.create_task(self._client()) for _ in range(self.args.clients)]
        samples: list[dict[str, Any]] = []
        try:
            await self._load(self.args.warm_up)
            begin = time.monotonic()
            while time.monotonic() - begin < self.args.minutes * 60:
                sample = await self._load(self.args.interval)
                samples.append({"at_s": round(time.monotonic() - begin, 1), **sample})
                print(json.dumps(samples[-1]), flush=True)
                for client in clients:
                    if client.done():
                        client.result()
        finally:
            self.stopped = True
            self.open.set()
            await asyncio.gather(*clients, return_exceptions=True)
            await self.http.aclose()
        self.faults += judge(samples, self.args.growth_mib, self.args.drift)
        return {"samples": samples, "requests": dict(self.seen), "faults": self.faults}

    async def _learn(self) -> None:
        """Prompts whose greedy answers have a clear margin, and those answers, one at a time."""
        while len(self.known) < 6:
            prompt = self._prompt()
            body = self._body(prompt, 24) | {"logprobs": 2, "stream": False}
            answer = (await self.http.post("/v1/completions", json=body)).json()
            logprobs = answer["choices"][0]["logprobs"]
            pairs = [sorted(top.values())[-2:] for top in logprobs["top_logprobs"]]
            if min(pair[-1] - pair[0] for pair in pairs if len(pair) > 1) > MARGIN:
                self.known.append((prompt, answer["choices"][0]["text"]))

    def _prompt(self) -> list[int]:
        length = int(self.args.longest ** self.random.random())  # short ones as often as long ones
        return [self.random.randrange(1, 490) for _ in range(max(1, length))]

    def _body(self, prompt: list[int], tokens: int) -> dict[str, Any]:
        return {
            "model": NAME, "prompt": prompt, "max_tokens": tokens, "temperature": 0,
            "ignore_eos": True, "stream": True,
        }  # fmt: skip

    async def _client(self) -> None:
        while not self.stopped:
            await self.open.wait()
            if self.stopped:
                return
            if self.args.pause:
                await asyncio.sleep(self.random.expovariate(1 / self.args.pause))
            self.busy += 1
            try:
                await self._request()
            except (httpx.HTTPError, AssertionError, KeyError, ValueError) as error:
                self.faults.append(f"a request failed: {error!r}")
                if len(self.faults) > 20:
                    raise
            finally:
                self.busy -= 1

    async def _request(self) -> None:
        rng = self.random
        kind = rng.choice(["whole", "whole", "known", "leaves in prefill", "leaves in decode"])
        if kind == "known":
            prompt, expected = rng.choice(self.known)
            text = await self._stream(prompt, 24, None)
            if text != expected:
                self.faults.append(f"answered {text!r}, alone {expected!r}")
        elif kind == "whole":
            # Half of them begin as an earlier one did.
            prompt = self._prompt()
            if self.recent and rng.random() < 0.5:
                prompt = (rng.choice(self.recent) + prompt)[: self.args.longest]
            self.recent = [*self.recent[-20:], prompt]
            await self._stream(prompt, rng.randint(1, 64), None)
        elif kind == "leaves in prefill":
            prompt = self._prompt()
            with contextlib.suppress(httpx.TimeoutException):
                await self._stream(prompt, 64, None, timeout=rng.uniform(0.005, 0.1))
            if rng.random() < 0.5:
                await self._stream(prompt, 8, None)
                self.seen["retried"] += 1
        else:
            await self._stream(self._prompt(), 256, rng.randint(1, 20))
        self.seen[kind] += 1

    async def _stream(
        self, prompt: list[int], tokens: int, leave_after: int | None, timeout: float = 300
    ) -> str:
        """Text of an answer; leaves after so many pieces of it."""
        text, last, pieces = "", time.monotonic(), 0
        body = self._body(prompt, tokens)
        async with self.http.stream("POST", "/v1/completions", json=body, timeout=timeout) as lines:
            assert lines.status_code == 200, f"status {lines.status_code}"
            async for line in events(lines):
                if not line.startswith(b"data: {"):
                    continue
                now = time.monotonic()
                (self.next_token if pieces else self.first_token).append(now - last)
                last, pieces = now, pieces + 1
                text += json.loads(line[6:])["choices"][0]["text"]
                if pieces == leave_after:
                    break
        return text

    async def _load(self, seconds: float) -> dict[str, Any]:
        """Let the clients loose, then hold them until the server is idle, and look at it."""
        self.first_token, self.next_token = [], []
        before = self.seen.total()
        self.open.set()
        await asyncio.sleep(seconds)
        loaded = (await self.http.get("/v1/lola/info")).json()["states"]["used"]
        self.open.clear()
        deadline = time.monotonic() + IDLE_LIMIT_S
        used, requests = -1, -1.0
        while self.busy or used or requests:
            assert self.server.process.poll() is None, self.server.log.read_text()[-3000:]
            if time.monotonic() > deadline:
                self.faults.append(f"not idle: {self.busy} clients, {used} states, {requests}")
                break
            await asyncio.sleep(0.2)
            used = (await self.http.get("/v1/lola/info")).json()["states"]["used"]
            requests = await self._requests_in_server()
        return {
            "requests": self.seen.total() - before,
            "first_token_ms": percentiles(self.first_token),
            "next_token_ms": percentiles(self.next_token),
            "memory_mib": family_mib(self.server.process.pid),
            "states_used_in_load": loaded,
            "states_used_idle": used,
        }

    async def _requests_in_server(self) -> float:
        text = (await self.http.get("/metrics")).text
        names = ("vllm:num_requests_running{", "vllm:num_requests_waiting{")
        return sum(float(x.rsplit(" ", 1)[1]) for x in text.splitlines() if x.startswith(names))


async def events(response: httpx.Response) -> AsyncIterator[bytes]:
    """Lines of an event stream; httpx ends some at U+0085 and others too, which a text may hold."""
    rest = b""
    async for piece in response.aiter_bytes():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield line


def family_mib(pid: int) -> dict[str, float]:
    """Memory of a process and all below it, by the order in which they started."""
    root = psutil.Process(pid)
    found = {}
    family = sorted([root, *root.children(recursive=True)], key=lambda p: (p.create_time(), p.pid))
    for i, process in enumerate(family):
        with contextlib.suppress(OSError, psutil.Error):
            found[f"{i} {process.name()}"] = round(memory_mib(process.pid), 1)
    return found


def percentiles(seconds: list[float]) -> dict[str, float]:
    """p50 and p99 in milliseconds."""
    if len(seconds) < 2:
        return {}
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return {"p50": round(cuts[49] * 1e3, 2), "p99": round(cuts[98] * 1e3, 2)}


def judge(samples: list[dict[str, Any]], growth_mib: float, drift: float) -> list[str]:
    """What is wrong with the samples of a soak.

    Memory: the level of the last third against that of the first, medians. Latency likewise.
    """
    if len(samples) < 3:
        return [f"only {len(samples)} samples: nothing can be said"]
    third = len(samples) // 3
    first, last = samples[:third], samples[-third:]
    faults = []
    if lost := [s["states_used_idle"] for s in samples if s["states_used_idle"] != 0]:
        faults.append(f"states in use while idle: {lost}")

    def level(part: list[dict[str, Any]], pick: Any) -> float:
        return statistics.median(pick(sample) for sample in part)

    grown = level(last, total_mib) - level(first, total_mib)
    if grown > growth_mib:
        faults.append(f"memory grew by {grown:.1f} MiB, more than {growth_mib}")
    for name in ("first_token_ms", "next_token_ms"):
        before, after = (level(part, lambda s, n=name: s[n]["p99"]) for part in (first, last))
        if after > drift * before:
            faults.append(f"{name}: p99 went from {before:.1f} to {after:.1f}")
    return faults


def total_mib(sample: dict[str, Any]) -> float:
    """Memory of all processes of a sample."""
    return float(sum(sample["memory_mib"].values()))


def soak(args: argparse.Namespace) -> dict[str, Any]:
    """Start a server, soak it, and tell."""
    with tempfile.TemporaryDirectory() as directory:
        model = args.model or make_speaking(Path(directory) / "tiny")
        command = serve_speaking(model, NAME)
        env = {
            "VLLM_LOGGING_LEVEL": "WARNING",
            "ONEDNN_PRIMITIVE_CACHE_CAPACITY": str(args.primitive_cache),
        }
        with serving(Path(directory) / "log.txt", command, **env) as server:
            report = asyncio.run(Soak(server, args, {}).run())
    settings = {k: v.name if isinstance(v, Path) else v for k, v in vars(args).items()}
    return {"settings": settings, **report}


def main() -> int:
    """Soak, print the verdict, write the JSON."""
    args = parse()
    report = soak(args)
    if args.out:
        summary.write(args.out, report, "tools.soak")
    memory = [round(total_mib(sample), 1) for sample in report["samples"]]
    print(f"requests: {report['requests']}\nmemory, MiB: {memory}")
    print("\n".join(report["faults"]) or "no fault")
    return 1 if report["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
