"""Stored states: a memory that outlives the request, the process and the machine.

Nothing here imports vLLM. `engine/vllm/connector.py` joins the store to vLLM. The names and the
settings load no torch, so that the commands that ask a server start at once.
"""
