#!/usr/bin/env python3
"""Run the steps of Dockerfile.cpu in a fresh Debian root, where no Docker engine is at hand.

    apt-get install debootstrap
    sudo PIP_EXTRA_INDEX_URL=... tools/try_image.py ROOT

makes a Debian in ROOT, a directory that must not exist, with Debian's Python 3.11 in place of the
base image's (or a copy of `--python`), executes every step, starts the entry point and asks the
server a question. It leaves ROOT there, to look at or to remove. `PIP_*` variables of the caller
are passed on.

What this does not show: that Docker parses the file, and its layers and their sizes.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
# What python:3.11-slim-bookworm has and a bare Debian has not.
PYTHON = ["python3.11", "python3.11-venv", "python3.11-dev"]
LIBRARIES = ["ca-certificates", "libbz2-1.0", "libffi8", "liblzma5", "libsqlite3-0", "openssl"]


class Image:
    """A root directory that Dockerfile steps change as they would an image."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.user, self.workdir = "root", "/"
        self.env = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
        self.build_env = {k: v for k, v in os.environ.items() if k.startswith("PIP_")}
        self.entry_point: list[str] = []
        self.command: list[str] = []

    def chroot(self, shell: str) -> list[str]:
        """The command that runs a shell line as the current user."""
        home = "/root" if self.user == "root" else f"/home/{self.user}"
        env = {**self.build_env, **self.env, "HOME": home}
        line = f"cd {shlex.quote(self.workdir)} && {shell}"
        command = ["chroot", f"--userspec={self.user}", str(self.root), "env", "-i"]
        return [*command, *(f"{k}={v}" for k, v in env.items()), "sh", "-c", line]

    def run(self, shell: str) -> None:
        subprocess.run(self.chroot(shell), check=True)

    def step(self, name: str, rest: str) -> None:
        """One instruction of the file."""
        print(f"--- {name} {rest[:100]}", flush=True)
        match name:
            case "RUN":
                self.run(rest)
            case "WORKDIR":
                self.workdir = rest
                (self.root / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)
            case "USER":
                self.user = rest
            case "ENV":
                for pair in shlex.split(rest):
                    key, _, value = pair.partition("=")
                    self.env[key] = value.replace("$PATH", self.env["PATH"])
            case "COPY":
                self.copy(rest)
            case "ENTRYPOINT":
                self.entry_point = json.loads(rest)
            case "CMD":
                self.command = json.loads(rest)
            case "FROM" | "LABEL" | "ARG" | "EXPOSE" | "HEALTHCHECK":
                pass
            case _:
                sys.exit(f"Dockerfile.cpu: {name} is not known here; add it to {__file__}")

    def copy(self, rest: str) -> None:
        """`COPY --chown=USER . .`: what git tracks or would track, as .dockerignore leaves."""
        if rest != "--chown=lola . .":
            sys.exit(f"Dockerfile.cpu: COPY {rest} is not known here; add it to {__file__}")
        target = self.root / self.workdir.lstrip("/")
        listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(listed, cwd=REPO, check=True, capture_output=True, text=True)
        for name in filter(lambda name: (REPO / name).is_file(), names.stdout.splitlines()):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPO / name, target / name)
        subprocess.run(["chroot", str(self.root), "chown", "-R", "lola", self.workdir], check=True)


def instructions(path: Path) -> list[tuple[str, str]]:
    """Name and arguments of each instruction, continued lines joined."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    pairs = [line.strip().partition(" ") for line in text.splitlines() if line.strip()]
    return [(name, " ".join(rest.split())) for name, _, rest in pairs]


def bind(root: Path, source: str) -> None:
    """Make a directory of this machine visible at the same place in the root, read-only."""
    target = root / source.lstrip("/")
    target.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "--bind", source, str(target)], check=True)
    subprocess.run(["mount", "-o", "remount,ro,bind", str(target)], check=True)


def ask(port: int) -> str:
    """Wait for the server and ask it something over the chat API."""
    url = f"http://127.0.0.1:{port}"
    for _ in range(600):
        try:
            urllib.request.urlopen(f"{url}/health", timeout=4)
            break
        except OSError:
            time.sleep(1)
    with urllib.request.urlopen(f"{url}/v1/models", timeout=30) as answer:
        model = json.load(answer)["data"][0]["id"]
    question = {
        "model": model,
        "messages": [{"role": "user", "content": "What is gravity?"}],
        "max_tokens": 30,
    }
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        json.dumps(question).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        return str(json.load(answer)["choices"][0]["message"]["content"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path, metavar="ROOT", help="a directory to make")
    parser.add_argument("--mirror", default="", help="of Debian (default: debootstrap's)")
    parser.add_argument("--suite", default="bookworm", help="of Debian (default: %(default)s)")
    parser.add_argument(
        "--python", metavar="DIR", help="prefix of a Python 3.11 to copy, not apt's"
    )
    parser.add_argument("--bind", action="append", default=[], metavar="DIR", help="show it inside")
    parser.add_argument("--port", type=int, default=8017)
    args = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("error: chroot and mount need root: sudo tools/try_image.py ...")
    if args.root.exists():
        sys.exit(f"error: {args.root} exists; name a directory to make")
    root = args.root.resolve()
    debootstrap = ["debootstrap", "--variant=minbase", args.suite, str(root)]
    subprocess.run([*debootstrap, *([args.mirror] if args.mirror else [])], check=True)
    image = Image(root)
    mounts = [str(root / name) for name in ("proc", "dev/shm", "sys")]
    mounts += [str(root / name.lstrip("/")) for name in args.bind]
    subprocess.run(["mount", "-t", "proc", "proc", mounts[0]], check=True)
    # As Docker mounts it; vLLM's processes pass messages in it.
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=1777", "shm", mounts[1]], check=True)
    subprocess.run(["mount", "-t", "sysfs", "-o", "ro", "sysfs", mounts[2]], check=True)
    server = None
    try:
        for name in args.bind:
            bind(root, name)
        packages = LIBRARIES + ([] if args.python else PYTHON)
        image.run(f"apt-get update -q && apt-get install -qy {' '.join(packages)}")
        if args.python:  # where the base image has its own
            without = shutil.ignore_patterns("site-packages", "test", "__pycache__")
            local = root / "usr/local"
            shutil.copytree(args.python, local, True, ignore=without, dirs_exist_ok=True)
            image.run("ldconfig")
        for name, rest in instructions(REPO / "Dockerfile.cpu"):
            image.step(name, rest)
        image.build_env = {}
        line = shlex.join([*image.entry_point, *image.command, "--port", str(args.port)])
        print(f"--- starting {line}", flush=True)
        server = subprocess.Popen(image.chroot(f"exec {line}"))
        print(f"--- answer: {ask(args.port)}", flush=True)
    finally:
        if server:
            server.terminate()
            server.wait(60)
        for mount in reversed(mounts):
            subprocess.run(["umount", mount], check=False)


if __name__ == "__main__":
    main()
