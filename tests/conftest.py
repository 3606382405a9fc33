"""Shared settings: quiet threads (a busy neighbour slows spinning ones tenfold)."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "ops"))  # tests share ops/problem.py
