"""Memory of a process: what it has allocated, wherever it lies."""

from pathlib import Path


def memory_mib(pid: int | str = "self") -> float:
    """RssAnon + VmSwap of a process; `OSError` if it has gone."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return sum(int(fields[name].split()[0]) for name in ("RssAnon", "VmSwap")) / 1024
