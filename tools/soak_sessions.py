"""Use the sessions of a server for minutes, kill it now and then, and check what it restores.

    python -m tools.soak_sessions --minutes 30 --out soak-sessions.json

Starts `lola-vllm serve` on a tiny random model (or `--model`) with a directory of states. Its
budgets hold a part of the sessions only. Several clients go on with sessions, fork and delete them,
ask without a name, and leave in the middle of answers. Every `--kill-every` seconds the server gets
SIGKILL and is started again. Answers are compared with those of the same tokens computed from
nothing, and the tokens of each session with what its client said and heard.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

from lola_vllm.evaluation import summary
from tools.soak import family_mib
from tools.support.server_process import BIN, Server, serving
from tools.support.speaking import make_speaking

NAME = "soaked"
ROUTE = "/v1/lola/sessions"
MARGIN = 0.02  # of log-probabilities: below it, another batch may turn a greedy choice
WORDS = 490  # token ids that any vocabulary has
LONGEST = 1500  # tokens of a session; then another one begins


class Fault(AssertionError):
    """Something that a server must not do."""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="default: a tiny random one, made here")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument(
        "--kill-every", type=float, default=180, help="seconds between two SIGKILLs"
    )
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--sessions", type=int, default=6, help="of each client, at most")
    parser.add_argument("--state-ram", default="4MiB")
    parser.add_argument("--state-disk", default="32MiB")
    parser.add_argument("--check", type=float, default=0.5, help="share of answers to compute anew")
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

    def run(self) -> None:
        """Do something, until the soak ends."""
        unsure, seen = False, 0  # of what a killed server had written; the life seen last
        while not self.soak.stopped.is_set():
            self.soak.up.wait()
            life = self.soak.life
            try:
                self.http.base_url = self.soak.url
                # A server that was killed may have stored the prompt of a turn and not its answer.
                if unsure or life != seen:
                    self._look_again()
                    unsure, seen = False, life
                self._act()
            except httpx.TransportError as error:
                unsure = True
                if self.soak.up.is_set() and self.soak.life == life:
                    self.soak.faults.append(f"a request failed: {error!r}")
            except Exception as error:  # of the server or of this program: never unseen
                self.soak.faults.append(f"{self.name}: {error!r}")
            if len(self.soak.faults) > 20:
                return

    def _act(self) -> None:
        kinds = ["goes on"] * 5 + ["leaves", "forks", "deletes", "no name"]
        kind = self.random.choice(kinds)
        name = self.random.choice([*self.known, ""])
        if kind == "no name":
            self._ask_without_a_name()
        elif kind in ("forks", "deletes") and name:
            self._fork(name) if kind == "forks" else self._remove(name)
        elif kind in ("goes on", "leaves"):
            if not name or len(self.known[name][0]) > LONGEST:
                name = self._new_name()
            self._go_on(name, leaves=kind == "leaves")
        self.soak.seen[kind] += 1

    def _new_name(self) -> str:
        if len(self.known) >= self.soak.args.sessions:
            self._remove(next(iter(self.known)))
        self.made += 1
        return f"c{self.number}-{self.made}"

    def _tokens(self, most: int) -> list[int]:
        return [self.random.randrange(1, WORDS) for _ in range(self.random.randint(1, most))]

    def _go_on(self, name: str, leaves: bool) -> None:
        said, turn = self.known.get(name, ([], 0))
        new = self._tokens(120)
        body = body_of(new, self.random.randint(1, 24)) | {"turn": turn}
        url = f"{ROUTE}/{name}/complete"
        if leaves:
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

    def _ask_without_a_name(self) -> None:
        """The whole of a session as a prompt, or a prefix that all clients share."""
        start = [*range(1, 301)]
        if self.known and self.random.random() < 0.5:
            start = self.random.choice([*self.known.values()])[0]
        prompt = start + self._tokens(30)
        found = read(self.http.post("/v1/completions", json=body_of(prompt, 8)))
        restored = found["kv_transfer_params"]["lola"]["restored_tokens"]
        self.soak.seen["restored without a name"] += restored > 0
        self._check(prompt, found["choices"][0]["token_ids"], "without a name")

    def _check(self, prompt: list[int], heard: list[int], what: str) -> None:
        """Some answers are computed from nothing as well."""
        if self.random.random() > self.soak.args.check:
            return
        params = {"kv_transfer_params": {"lola": {"from": False, "save": False}}, "logprobs": 2}
        answer = self.http.post("/v1/completions", json=body_of(prompt, len(heard)) | params)
        cold = read(answer)["choices"][0]
        self.soak.seen["compared"] += 1
        for place, (one, two) in enumerate(zip(heard, cold["token_ids"], strict=True)):
            if one != two:
                likely = sorted(cold["logprobs"]["top_logprobs"][place].values())[-2:]
                if likely[-1] - likely[0] > MARGIN:
                    raise Fault(
                        f"{what}: {heard} after {len(prompt)} tokens, cold {cold['token_ids']}"
                    )
                self.soak.seen["near ties"] += 1
                return

    def _fork(self, name: str) -> None:
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

    def _remove(self, name: str) -> None:
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
    """A server that is killed and started again, and its clients."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.url = ""
        self.up, self.stopped = threading.Event(), threading.Event()
        self.life = 0
        self.seen: Counter[str] = Counter()
        self.faults: list[str] = []

    def run(self, model: Path, directory: Path) -> dict[str, Any]:
        """The whole soak."""
        args, samples = self.args, []
        command = [
            str(BIN / "lola-vllm"), "serve", str(model), "--served-model-name", NAME,
            "--enforce-eager", "--dtype", "float32", "--max-model-len", "4096",
            "--max-num-seqs", "16", "--max-num-batched-tokens", "256",
            "--lola-state-ram", args.state_ram, "--lola-state-disk", args.state_disk,
            "--lola-state-dir", str(directory / "states"),
        ]  # fmt: skip
        clients = [Client(i, self) for i in range(args.clients)]
        end = time.monotonic() + 60 * args.minutes
        while time.monotonic() < end and len(self.faults) <= 20:
            with serving(directory / f"log-{self.life}.txt", command) as server:
                self.url = server.url
                self.life += 1  # a kill and a start: a request that saw either failed for a reason
                self.up.set()
                if self.life == 1:
                    for client in clients:
                        client.start()
                time.sleep(max(1, min(args.kill_every, end - time.monotonic())))
                samples.append(self._look(server))
                print(json.dumps(samples[-1]), flush=True)
                if time.monotonic() >= end - 1:
                    self.stopped.set()
                    for client in clients:
                        client.join(120)
                else:
                    self.up.clear()
                    self.life += 1
                    time.sleep(0.1)  # clients that are about to ask note it
                    os.killpg(server.process.pid, signal.SIGKILL)
        return {"lives": self.life // 2 + 1, "samples": samples, "seen": dict(self.seen)}

    def _look(self, server: Server) -> dict[str, Any]:
        listed = read(server.client.get(ROUTE))["sessions"]
        memory = round(sum(family_mib(server.process.pid).values()), 1)
        failures = {
            line.split('reason="')[1].split('"')[0]: float(line.rsplit(" ", 1)[1])
            for line in server.client.get("/metrics").text.splitlines()
            if line.startswith("lola:session_failures_total")
        }
        return {
            "sessions": len(listed),
            "memory_mib": memory,
            "requests": self.seen.total(),
            "failures": {reason: count for reason, count in failures.items() if count},
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


def main() -> int:
    """Soak, print the verdict, write the JSON."""
    args = parse()
    soak = Soak(args)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        model = args.model or make_speaking(directory / "tiny")
        report = soak.run(model, directory)
    settings = {k: v.name if isinstance(v, Path) else v for k, v in vars(args).items()}
    report = {"settings": settings, **report, "faults": soak.faults}
    if args.out:
        summary.write(args.out, report, "tools.soak_sessions")
    print(json.dumps(report["seen"], indent=1))
    print("\n".join(soak.faults) or "no fault")
    return 1 if soak.faults else 0


if __name__ == "__main__":
    sys.exit(main())
