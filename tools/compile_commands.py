"""Writes compile_commands.json: how each C++ source of csrc/ is compiled, for clang's tools.

    python tools/compile_commands.py

The flags are those of setup.py. CUDA sources are left out.
"""

from __future__ import annotations

import json
import sys
import sysconfig
from distutils.core import run_setup
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Write the file to the top of the checkout, or say why there is nothing to write."""
    extensions = run_setup(str(ROOT / "setup.py"), ["--quiet"], stop_after="init").ext_modules
    if not extensions:
        sys.exit("setup.py builds no extension here")
    (extension,) = extensions
    macros = [f"-D{name}={value}" for name, value in extension.define_macros if value is not None]
    own = str(ROOT / "csrc")
    flags = [
        "-std=c++20",  # as torch builds extensions
        "-fPIC",
        *extension.extra_compile_args["cxx"],
        *macros,
        f"-I{own}",
        # Headers of others are the system's: nobody here mends their warnings.
        *(f"-isystem{path}" for path in extension.include_dirs if path != own),
        f"-isystem{sysconfig.get_paths()['include']}",
    ]
    commands = [
        {
            "directory": str(ROOT),
            "file": source,
            "arguments": ["c++", *flags, "-c", source],
        }
        for source in extension.sources
        if source.endswith(".cpp")
    ]
    (ROOT / "compile_commands.json").write_text(json.dumps(commands, indent=1) + "\n")


if __name__ == "__main__":
    main()
