"""Whether another release of vLLM has what the plugin and its tests use, from its sources alone.

    pip download --no-deps --only-binary=:all: vllm==0.33.0 -d wheels
    python tools/check_vllm.py wheels/vllm-0.33.0-*.whl

Takes a wheel, or a folder that holds `vllm/`, and compares it with the vLLM that is installed here.
Names, methods and fields that are not there are missing; functions with other parameters have
changed, which a person must judge. Nothing of vLLM is imported: no device and no torch is needed.
"""

from __future__ import annotations

import ast
import sys
import zipfile
from collections.abc import Iterator
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
USERS = ("lola_vllm", "kernels", "serving", "benchmarks", "tools", "tests")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)

# Classes of objects that the plugin is handed, and whose names it never imports.
CONFIGS = "Cache Compilation Device KVTransfer Load LoRA Model Parallel Scheduler Speculative"
HANDED = {f"{name.lower()}config": [("vllm.config", f"{name}Config")] for name in CONFIGS.split()}
HANDED["modelrunner"] = [
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner"),
    ("vllm.v1.worker.gpu_input_batch", "CachedRequestState"),
    ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner"),
    ("vllm.v1.worker.gpu.states", "RequestState"),
    ("vllm.v1.worker.gpu.block_table", "BlockTables"),
]
Use = tuple[str, str, str]  # module, name in it, member of that or ""
Definition = tuple[str, ast.AST]  # the module that defines it, and how


class Sources:
    """The modules of one vLLM, parsed when asked for."""

    def __init__(self, path: Path) -> None:
        self.root = zipfile.Path(path) if path.suffix == ".whl" else path
        if not (self.root / "vllm" / "__init__.py").is_file():
            sys.exit(f"{path}: neither a wheel of vLLM nor a folder that holds vllm/__init__.py")
        self.names = lru_cache(maxsize=None)(self._names)
        self.members = lru_cache(maxsize=None)(self._members)

    def _names(self, module: str) -> dict[str, ast.AST] | None:
        """What a module defines or imports, None if there is no such module."""
        base = module.replace(".", "/")
        for name in (f"{base}.py", f"{base}/__init__.py"):
            if (self.root / name).is_file():
                tree = ast.parse((self.root / name).read_text(encoding="utf-8"))
                package = module if name.endswith("__init__.py") else module.rpartition(".")[0]
                return dict(_defined(tree.body, package))
        return None

    def find(self, module: str, name: str) -> Definition | None:
        """Where a name of a module is defined, imports followed."""
        names = self.names(module) or {}
        node = names.get(name)
        for star in (n for k, n in names.items() if node is None and k.endswith("*")):
            if found := self.find(star.module, name):  # type: ignore[attr-defined]
                return found
        if isinstance(node, ast.ImportFrom):
            original = next(a.name for a in node.names if (a.asname or a.name) == name)
            return self.find(node.module or "", original) or (module, node)
        if node is None and self.names(f"{module}.{name}") is not None:
            return module, ast.Module([], [])  # a submodule
        return None if node is None else (module, node)

    def _members(self, module: str, node: ast.AST) -> dict[str, ast.AST]:
        """Methods and fields of a class, of its bases within vLLM too."""
        found: dict[str, ast.AST] = {}
        if not isinstance(node, ast.ClassDef):
            return found
        for base in reversed(node.bases):
            where = self.find(module, ast.unparse(base).partition("[")[0])
            found |= self.members(*where) if where else {}
        for part in ast.walk(node):
            if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store):
                found.setdefault(part.attr, part)
        return found | dict(_defined(node.body, module))


def _defined(body: list[ast.stmt], package: str) -> Iterator[tuple[str, ast.AST]]:
    for node in body:
        if isinstance(node, ast.ImportFrom):
            if node.level:  # written out, so that it can be followed
                parents = package.split(".")[: len(package.split(".")) + 1 - node.level]
                node.module, node.level = ".".join([*parents, node.module or ""]).rstrip("."), 0
            stars = f"{node.module}.*"
            yield from ((stars if a.name == "*" else a.asname or a.name, node) for a in node.names)
        elif isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            yield node.name, node
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from ((ast.unparse(target), node) for target in targets)
        elif isinstance(node, (ast.If, ast.Try)):
            yield from _defined([*node.body, *node.orelse], package)
        # Names made when they are first asked for: in a table, or in what `__getattr__` compares.
        if isinstance(getattr(node, "value", None), ast.Dict) or (
            isinstance(node, ast.FunctionDef) and node.name == "__getattr__"
        ):
            texts = (n.value for n in ast.walk(node) if isinstance(n, ast.Constant))
            yield from ((t, node) for t in texts if isinstance(t, str) and t.isidentifier())


def uses(path: Path) -> set[Use]:
    """What a file of the plugin imports of vLLM, with every word that may be a member of it."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    imported = {
        (node.module or "", alias.name)
        for node in nodes
        if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith("vllm.")
        for alias in node.names
    }
    words = {n.attr for n in nodes if isinstance(n, ast.Attribute)}
    words |= {n.name for n in nodes if isinstance(n, FUNCTIONS)}
    names = words | {n.id for n in nodes if isinstance(n, ast.Name)}
    names |= {n.arg for n in nodes if isinstance(n, ast.arg)}
    handed = {use for name in names for use in HANDED.get(name.replace("_", ""), [])}
    return {(*use, word) for use in imported | handed for word in {"", *words}}


def compare(old: Sources, new: Sources, wanted: set[Use]) -> Iterator[str]:
    """What `new` lacks, or has with other parameters than `old`."""
    for module, name, member in sorted(wanted):
        where = old.find(module, name), new.find(module, name)
        label = ".".join(filter(None, (module, name, member)))
        if member:
            was, now = (
                s.members(*w).get(member) if w else None
                for s, w in zip((old, new), where, strict=True)
            )
            if was is None or where[1] is None:  # mostly another object's, or reported already
                continue
        else:
            was, now = (w and w[1] for w in where)
        if now is None:
            yield f"missing: {label}"
        elif _parameters(was) not in ("", _parameters(now)):
            yield f"changed: {label}({_parameters(was)}) -> ({_parameters(now)})"


def _parameters(node: ast.AST | None) -> str:
    return ast.unparse(node.args) if isinstance(node, FUNCTIONS) else ""


def main() -> int:
    """Print the differences; 1 if something is missing."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    if (spec := find_spec("vllm")) is None or spec.origin is None:
        sys.exit("no vLLM is installed here to compare with")
    installed = Sources(Path(spec.origin).parents[1])
    wanted = {u for d in USERS for file in (ROOT / d).rglob("*.py") for u in uses(file)}
    found = list(compare(installed, Sources(Path(sys.argv[1])), wanted))
    print("\n".join(found) or "no difference")
    return int(any(line.startswith("missing") for line in found))


if __name__ == "__main__":
    sys.exit(main())
