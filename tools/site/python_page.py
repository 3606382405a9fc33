"""The page of the Python API, from signatures and docstrings."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from typing import Any

from tools.site.docstrings import markdown, split

HEAD = """# Python API

This page is made of the docstrings. Shapes are in brackets. Hq, Hkv and Hs are the numbers of
query, KV and state heads, d is the size of a head, and F the columns of a feature map.
"""

# What programs may rely on. All else may change between two versions without a word.
PUBLIC = {
    "lola_vllm": ["register"],
    "lola_vllm.core.config": ["LolaConfig", "LolaLlamaConfig", "LolaConfigError"],
    "lola_vllm.engine.hf": ["LolaLlamaForCausalLM", "LolaCache"],
    "lola_vllm.engine.estimate": ["estimate", "Estimate"],
    "lola_vllm.models.init": ["init_checkpoint"],
    "lola_vllm.models.convert": ["convert_checkpoint"],
    "lola_vllm.models.quantize": ["quantize_checkpoint"],
    "lola_vllm.models.shipped": ["BuildOptions"],
    "lola_vllm.models.demo": ["build_demo_model"],
    "lola_vllm.models.qwen_coder": ["build_qwen_coder"],
    "lola_vllm.training.distill.run": ["distill"],
    "lola_vllm.core.state": ["StateLayout"],
    "lola_vllm.core.ops.reference": None,  # all that the module defines
}
# Objects whose text is on another page.
ELSEWHERE = {"LolaConfig": "[Its fields](../configuration.md#lola-parameters) have a table."}


def page() -> str:
    """Markdown with a section for every module."""
    return "\n".join([HEAD, *(line for name in PUBLIC for line in _module(name))])


def _module(name: str) -> Iterator[str]:
    module = importlib.import_module(name)
    names = PUBLIC[name]
    if names is None:
        names = [
            key
            for key, value in vars(module).items()
            if getattr(value, "__module__", "") == name and not key.startswith("_")
        ]
    yield f"## {name}\n"
    about = inspect.getdoc(module)
    if about and names != ["register"]:
        yield f"{markdown(about)}\n"
    for key in names:
        yield from _object(key, getattr(module, key), 3)


def _object(name: str, value: Any, level: int) -> Iterator[str]:
    yield f"{'#' * level} {name}\n"
    signature = _signature(name, value)
    if signature:
        yield f"```python\n{signature}\n```\n"
    about = inspect.getdoc(value)
    if name in ELSEWHERE:
        yield f"{split(about or '')['']}\n\n{ELSEWHERE[name]}\n"
    elif about:
        yield f"{markdown(about)}\n"
    if inspect.isclass(value):
        for key, member in vars(value).items():
            member = member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
            own = inspect.isfunction(member) or isinstance(member, property)
            if own and not key.startswith("_") and inspect.getdoc(member):
                yield from _object(f"{name}.{key}", member, level + 1)


def _signature(name: str, value: Any) -> str:
    if isinstance(value, property) or (inspect.isclass(value) and issubclass(value, Exception)):
        return ""
    if inspect.isclass(value) and hasattr(value, "model_fields"):
        return ""  # pydantic's signature repeats its fields
    try:
        signature = str(inspect.signature(value))
    except (TypeError, ValueError):
        return ""
    # Annotations are texts; of a method the first parameter is not passed.
    signature = re.sub(r"""(: |-> )(['"])(.*?)\2""", r"\1\3", signature)
    signature = re.sub(r"\b(?:[a-z_]+\.)+([A-Z]\w*)", r"\1", signature)
    signature = re.sub(r"^\((?:self|cls)(?:, )?", "(", signature)
    if len(name) + len(signature) > 88:
        inside = re.split(r", (?![^\[(]*[\])])", signature[1 : signature.rindex(")")])
        end = signature[signature.rindex(")") :]
        signature = "(\n    " + ",\n    ".join(inside) + ",\n" + end
    return f"{name}{signature}"
