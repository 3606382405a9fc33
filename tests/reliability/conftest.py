"""Engines run inside the test process, with a cache of their own."""

import os
import tempfile

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_CACHE_ROOT", tempfile.mkdtemp(prefix="lola-vllm-test-"))
