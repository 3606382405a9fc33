"""Reliability: the tests use the tools of those of ops, engines and HTTP."""

import os
import sys
import tempfile
from pathlib import Path

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_CACHE_ROOT", tempfile.mkdtemp(prefix="lola-vllm-test-"))

for directory in ("engine", "serving"):
    sys.path.insert(0, str(Path(__file__).parents[1] / directory))
