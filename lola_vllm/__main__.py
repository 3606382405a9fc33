"""`python -m lola_vllm`: the same as the `lola-vllm` command."""

import sys

from lola_vllm.command.cli import main

if __name__ == "__main__":
    sys.exit(main())
