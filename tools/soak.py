"""Load a server with random requests and stored sessions, kill it now and then, and watch it.

    python -m tools.soak --minutes 30 --pause 2 --out soak.json
    python -m tools.soak --minutes 30 --kill --out soak-killed.json

Starts `lola-vllm serve` on a tiny random model (or `--model`), with little room for states. Clients
stream answers of random prompts and leave some while the prompt is computed and some in the middle
of the answer. They go on with sessions of theirs, fork and delete them, ask without a name, and
leave. After each interval the clients pause until the server is idle, and memory and states are
read. With `--kill` the server then gets SIGKILL under load, and is started again.

It fails when memory grows, a state is lost, answers become slower, a request whose answer is known
is answered otherwise, an answer differs from that of the same tokens computed from nothing, or a
session has other tokens than its client said and heard.

Memory is RssAnon + VmSwap of the server's processes: what they have allocated, wherever it lies.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import psutil

from lola_vllm.evaluation import summary
from tools.support.server_process import Server, serving
from tools.support.speaking import make_speaking, serve_speaking

NAME = "soaked"
ASK, ROUTE = "/v1/completions", "/v1/lola/sessions"
WORDS = 490  # token ids that any vocabulary has
LONGEST = 1500  # tokens of a prompt, and of a session: then another one begins
SESSIONS = 6  # of each client, at most
CHECKED = 0.5  # share of answers that are computed from nothing as well
MARGIN = 0.02  # of log-probabilities: below it, another batch may turn a greedy choice
GROWTH_MIB, DRIFT = 32, 2  # what memory may grow by, and by what factor p99 may
IDLE_LIMIT_S = 60
MOST_FAULTS = 20
STORE = [
    "--lola-list-sessions", "--lola-state-ram", "4MiB", "--lola-state-disk", "32MiB",
    "--lola-state-dir",
]  # fmt: skip
# oneDNN's cache grows with every new number of tokens in a step, and would hide or feign a leak.
ENV = {"VLLM_LOGGING_LEVEL": "WARNING", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0"}


class Fault(AssertionError):
    """Something that a server must not do."""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="default: a tiny random one, made here")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--interval", type=float, default=60, help="seconds of load per sample")
    parser.add_argument("--warm-up", type=float, default=60, help="seconds before the first")
    parser.add_argument("--kill", action="store_true", help="SIGKILL after each interval")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--pause", type=float, default=0, help="mean seconds between its requests")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    return parser.parse_args(argv)


class Client(threading.Thread):
    """One user: the tokens and the last turn of each of its sessions.

    Args:
        number: of the client; its sessions have names of their own.
    """

    def __init__(self, number: int, soak: Soak) -> None:
        super().__init__(name=f"client-{number}", daemon=True)
        self.number, self.soak = number, soak
        self.random = random.Random(f"{soak.args.seed} {number}")
        self.http = httpx.Client(timeout=120)
        self.known: dict[str, tuple[list[int], int]] = {}
        self.made = 0
        self.busy = False
        self.kinds = {
            self._whole: ["whole"] * 2,
            self._known: ["known"],
            self._leave: ["leaves in prefill", "leaves in decode"],
            self._go_on: ["goes on"] * 5 + ["leaves"],
            self._fork: ["forks"],
            self._remove: ["deletes"],
            self._ask_without_a_name: ["no name"],
        }

    def run(self) -> None:
        """Do something, until the soak ends."""
        unsure, seen = False, 0  # of what a killed server had written; the life seen last
        acts = [(act, kind) for act, kinds in self.kinds.items() for kind in kinds]
        while len(self.soak.faults) <= MOST_FAULTS:
            self.busy = False
            if self.soak.args.pause:
                time.sleep(self.random.expovariate(1 / self.soak.args.pause))
            self.soak.open.wait()
            self.busy = True
            if self.soak.stopped:
                break
            if not self.soak.open.is_set():
                continue
            life = self.soak.life
            act, kind = self.random.choice(acts)
            try:
                self.http.base_url = self.soak.url
                # A server that was killed may have stored the prompt of a turn and not its answer.
                if unsure or life != seen:
                    self._look_again()
                    unsure, seen = False, life
                act(kind)
                self.soak.seen[kind] += 1
            except httpx.TransportError as error:
                unsure = True
                if self.soak.open.is_set() and self.soak.life == life:
                    self.soak.faults.append(f"a request failed: {error!r}")
            except Exception as error:  # of the server or of this program: never unseen
                self.soak.faults.append(f"{self.name}: {error!r}")
        self.busy = False

    # --- requests of no session

    def _prompt(self) -> list[int]:
        return self._tokens(int(LONGEST ** self.random.random()))  # short ones as often as long

    def _tokens(self, count: int) -> list[int]:
        return [self.random.randrange(1, WORDS) for _ in range(max(1, count))]

    def _whole(self, kind: str) -> None:
        prompt = self._prompt()
        if self.soak.recent and self.random.random() < 0.5:  # it begins as an earlier one did
            prompt = (self.random.choice(self.soak.recent) + prompt)[:LONGEST]
        self.soak.recent = [*self.soak.recent[-20:], prompt]
        self._stream(prompt, self.random.randint(1, 64))

    def _known(self, kind: str) -> None:
        prompt, expected = self.random.choice(self.soak.known)
        text = self._stream(prompt, 24)
        if text != expected:
            raise Fault(f"answered {text!r}, alone {expected!r}")

    def _leave(self, kind: str) -> None:
        prompt = self._prompt()
        if kind == "leaves in decode":
            self._stream(prompt, 256, leave_after=self.random.randint(1, 20))
            return
        with contextlib.suppress(httpx.TimeoutException):
            self._stream(prompt, 64, timeout=self.random.uniform(0.005, 0.1))
        if self.random.random() < 0.5:
            self._stream(prompt, 8)
            self.soak.seen["retried"] += 1

    def _stream(
        self, prompt: list[int], tokens: int, leave_after: int = 0, timeout: float = 120
    ) -> str:
        """Text of an answer; leaves after so many pieces of it."""
        text, last, pieces = "", time.monotonic(), 0
        body = body_of(prompt, tokens) | {"stream": True}
        with self.http.stream("POST", ASK, json=body, timeout=timeout) as answer:
            if answer.status_code != 200:
                raise Fault(f"{ASK}: {answer.status_code}")
            rest = b""  # httpx ends lines at U+0085 and others too, which a text may hold
            for part in answer.iter_bytes():
                *lines, rest = (rest + part).split(b"\n")
                for line in lines:
                    if not line.startswith(b"data: {"):
                        continue
                    now = time.monotonic()
                    self.soak.seconds[pieces > 0].append(now - last)
                    last, pieces = now, pieces + 1
                    text += json.loads(line[6:])["choices"][0]["text"]
                    if pieces == leave_after:
                        return text
        return text

    def _ask_without_a_name(self, kind: str) -> None:
        """The whole of a session as a prompt, or a prefix that all clients share."""
        start = [*range(1, 301)]
        if self.known and self.random.random() < 0.5:
            start = self.random.choice([*self.known.values()])[0]
        prompt = start + self._tokens(self.random.randint(1, 30))
        found = read(self.http.post(ASK, json=body_of(prompt, 8)))
        restored = found["kv_transfer_params"]["lola"]["restored_tokens"]
        self.soak.seen["restored without a name"] += restored > 0
        self._check(prompt, found["choices"][0]["token_ids"], "without a name")

    def _check(self, prompt: list[int], heard: list[int], what: str) -> None:
        """Some answers are computed from nothing as well."""
        if self.random.random() > CHECKED:
            return
        params = {"kv_transfer_params": {"lola": {"from": False, "save": False}}, "logprobs": 2}
        cold = read(self.http.post(ASK, json=body_of(prompt, len(heard)) | params))["choices"][0]
        self.soak.seen["compared"] += 1
        for place, (one, two) in enumerate(zip(heard, cold["token_ids"], strict=True)):
            if one != two:
                if margin(cold["logprobs"]["top_logprobs"][place]) > MARGIN:
                    raise Fault(
                        f"{what}: {heard} after {len(prompt)} tokens, cold {cold['token_ids']}"
                    )
                self.soak.seen["near ties"] += 1
                return

    # --- sessions

    def _any(self) -> str:
        """A session of this client, or none."""
        return self.random.choice([*self.known, ""])

    def _new_name(self) -> str:
        if len(self.known) >= SESSIONS:
            self._drop(next(iter(self.known)))
        self.made += 1
        return f"c{self.number}-{self.made}"

    def _go_on(self, kind: str) -> None:
        name = self._any()
        if not name or len(self.known[name][0]) > LONGEST:
            name = self._new_name()
        said, turn = self.known.get(name, ([], 0))
        new = self._tokens(self.random.randint(1, 120))
        body = body_of(new, self.random.randint(1, 24)) | {"turn": turn}
        url = f"{ROUTE}/{name}/complete"
        if kind == "leaves":
            with self.http.stream("POST", url, json=body | {"stream": True}) as response:
                for pieces, _ in enumerate(response.iter_bytes()):
                    if pieces >= self.random.randint(0, 4):
                        break
            self._look_again(name)
            return
        answer = self.http.post(url, json=body)
        if answer.status_code in (404, 409):
            # 409: an answer that this client left has not ended yet, or did in the end.
            self.soak.seen["gone" if answer.status_code == 404 else "busy"] += 1
            self._look_again(name)
            return
        found = read(answer)
        told = found["kv_transfer_params"]["lola"]
        heard = found["choices"][0]["token_ids"]
        self.known[name] = said + new + heard, told["turn"]
        self.soak.seen["restored"] += told["restored_tokens"] > 0
        if told["tokens"] < len(said + new + heard) - 1:
            there = self.http.get(f"{ROUTE}/{name}").text
            raise Fault(
                f"{name}, life {self.soak.life}, after {len(said)} and {len(new)} tokens: the "
                f"answer was not stored: {told} of {len(said + new + heard)}; {there}"
            )
        if told["restored_tokens"] > len(said + new):
            raise Fault(f"{name}: restored {told['restored_tokens']} of {len(said + new)} tokens")
        self._check(said + new, heard, name)

    def _fork(self, kind: str) -> None:
        if not (name := self._any()):
            return
        said, turn = self.known[name]
        to = self._new_name()
        if name not in self.known:  # it made room
            return
        answer = self.http.post(f"{ROUTE}/{name}/fork", json={"to": to})
        if answer.status_code == 404:
            self._look_again(name)
            return
        read(answer)
        self.known[to] = said, turn
        self._look_again(to)

    def _remove(self, kind: str) -> None:
        if name := self._any():
            self._drop(name)

    def _drop(self, name: str) -> None:
        del self.known[name]
        answer = self.http.delete(f"{ROUTE}/{name}")
        if answer.status_code not in (200, 204, 404, 409):
            raise Fault(f"DELETE {name}: {answer.status_code} {answer.text}")

    def _look_again(self, *names: str) -> None:
        """Ask what the server has of sessions; it may have less than was said, but nothing else."""
        for name in names or [*self.known]:
            said, _ = self.known.get(name, (None, 0))
            answer = self.http.get(f"{ROUTE}/{name}/tokens")
            if answer.status_code == 404:
                self.known.pop(name, None)
                continue
            found = read(answer)
            theirs = found["tokens"]
            if said is not None and theirs[: len(said)] != said[: len(theirs)]:
                raise Fault(f"{name}: the server has other tokens than were said")
            self.known[name] = theirs, found["turn"]


class Soak:
    """A server, which may be killed and started again, and its clients."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.url = ""
        self.open, self.stopped = threading.Event(), False
        self.life = 0  # a kill and a start: a request that saw either failed for a reason
        self.known: list[tuple[list[int], str]] = []
        self.recent: list[list[int]] = []
        self.seen: Counter[str] = Counter()
        self.seconds: tuple[list[float], list[float]] = ([], [])  # to a first token, to a next one
        self.faults: list[str] = []
        self.clients = [Client(i, self) for i in range(args.clients)]

    def run(self, model: Path, directory: Path) -> dict[str, Any]:
        """The whole soak: lives, samples, what was asked, and faults."""
        samples: list[dict[str, Any]] = []
        command = [*serve_speaking(model, NAME), *STORE, str(directory / "states")]
        begin, minutes = time.monotonic(), 0.0
        while minutes < self.args.minutes:
            with serving(directory / f"log-{self.life}.txt", command, **ENV) as server:
                self.url = server.url
                self.life += 1
                if self.life == 1:
                    self._learn(server)
                    for client in self.clients:
                        client.start()
                    self._load(server, self.args.warm_up)
                    begin = time.monotonic()
                while minutes < self.args.minutes:
                    samples.append(self._load(server, self.args.interval))
                    print(json.dumps(samples[-1]), flush=True)
                    minutes = (time.monotonic() - begin) / 60
                    if len(self.faults) > MOST_FAULTS:
                        minutes = self.args.minutes
                    if self.args.kill and minutes < self.args.minutes:
                        self._kill(server)
                        break
        self.stopped = True
        self.open.set()
        self.faults += judge(samples)
        kills = (self.life - 1) // 2
        return {"kills": kills, "samples": samples, "seen": self.seen, "faults": self.faults}

    def _learn(self, server: Server) -> None:
        """Prompts whose greedy answers have a clear margin, and those answers, one at a time."""
        prompts = Client(-1, self)
        while len(self.known) < 6:
            prompt = prompts._prompt()
            answer = read(server.client.post(ASK, json=body_of(prompt, 24) | {"logprobs": 2}))
            (choice,) = answer["choices"]
            tops = choice["logprobs"]["top_logprobs"]
            if min(margin(top) for top in tops if len(top) > 1) > MARGIN:
                self.known.append((prompt, choice["text"]))

    def _kill(self, server: Server) -> None:
        """SIGKILL under load."""
        self.open.set()
        time.sleep(min(5, self.args.interval))
        self.open.clear()
        self.life += 1
        time.sleep(0.1)  # clients that are about to ask note it
        os.killpg(server.process.pid, signal.SIGKILL)

    def _load(self, server: Server, seconds: float) -> dict[str, Any]:
        """Let the clients loose, then hold them until the server is idle, and look at it."""
        self.seconds = [], []
        before = self.seen.total()
        self.open.set()
        time.sleep(seconds)
        self.open.clear()
        deadline = time.monotonic() + IDLE_LIMIT_S
        while True:
            busy = sum(client.busy for client in self.clients)
            used = read(server.client.get("/v1/lola/info"))["states"]["used"]
            metrics = server.client.get("/metrics").text.splitlines()
            names = ("vllm:num_requests_running{", "vllm:num_requests_waiting{")
            requests = sum(float(x.rsplit(" ", 1)[1]) for x in metrics if x.startswith(names))
            if not (busy or used or requests):
                break
            if time.monotonic() > deadline:
                self.faults.append(f"not idle: {busy} clients, {used} states, {requests}")
                break
            time.sleep(0.2)
        failures = [x for x in metrics if x.startswith("lola:session_failures_total")]
        return {
            "requests": self.seen.total() - before,
            "first_token_ms": percentiles(self.seconds[0]),
            "next_token_ms": percentiles(self.seconds[1]),
            "memory_mib": family_mib(server.process.pid),
            "states_used_idle": used,
            "sessions": len(read(server.client.get(ROUTE))["sessions"]),
            "failures": [line for line in failures if float(line.rsplit(" ", 1)[1])],
        }


def body_of(prompt: list[int], tokens: int) -> dict[str, Any]:
    """A greedy request whose answer has no special token: a session leaves such an end out."""
    return {
        "model": NAME, "prompt": prompt, "max_tokens": tokens, "temperature": 0,
        "ignore_eos": True, "return_token_ids": True, "allowed_token_ids": [*range(1, WORDS)],
    }  # fmt: skip


def read(answer: httpx.Response) -> Any:
    """The body of an answer that must be one.

    Raises:
        Fault: another status.
    """
    if answer.status_code != 200:
        raise Fault(f"{answer.request.url.path}: {answer.status_code} {answer.text[:300]}")
    return answer.json()


def margin(top: dict[str, float]) -> float:
    """By how much the likeliest token's log-probability leads."""
    likely = sorted(top.values())
    return likely[-1] - likely[-2]


def family_mib(pid: int) -> dict[str, float]:
    """RssAnon + VmSwap of a process and all below it, by the order in which they started."""
    root = psutil.Process(pid)
    found = {}
    family = sorted([root, *root.children(recursive=True)], key=lambda p: (p.create_time(), p.pid))
    for i, process in enumerate(family):
        with contextlib.suppress(OSError, psutil.Error):
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            fields = dict(line.split(":", 1) for line in lines if ":" in line)
            kib = sum(int(fields[name].split()[0]) for name in ("RssAnon", "VmSwap"))
            found[f"{i} {process.name()}"] = round(kib / 1024, 1)
    return found


def percentiles(seconds: list[float]) -> dict[str, float]:
    """p50 and p99 in milliseconds."""
    if len(seconds) < 2:
        return {}
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return {"p50": round(cuts[49] * 1e3, 2), "p99": round(cuts[98] * 1e3, 2)}


def judge(samples: list[dict[str, Any]]) -> list[str]:
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
    if grown > GROWTH_MIB:
        faults.append(f"memory grew by {grown:.1f} MiB, more than {GROWTH_MIB}")
    for name in ("first_token_ms", "next_token_ms"):
        before, after = (level(part, lambda s, n=name: s[n]["p99"]) for part in (first, last))
        if after > DRIFT * before:
            faults.append(f"{name}: p99 went from {before:.1f} to {after:.1f}")
    return faults


def total_mib(sample: dict[str, Any]) -> float:
    """Memory of all processes of a sample."""
    return float(sum(sample["memory_mib"].values()))


def main() -> int:
    """Soak, print the verdict, write the JSON."""
    args = parse()
    with tempfile.TemporaryDirectory() as name:
        model = args.model or make_speaking(Path(name) / "tiny")
        report = Soak(args).run(model, Path(name))
    settings = {k: v.name if isinstance(v, Path) else v for k, v in vars(args).items()}
    if args.out:
        summary.write(args.out, {"settings": settings, **report}, "tools.soak")
    memory = [round(total_mib(sample), 1) for sample in report["samples"]]
    print(f"requests: {dict(report['seen'])}\nmemory, MiB: {memory}")
    print("\n".join(report["faults"]) or "no fault")
    return 1 if report["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
