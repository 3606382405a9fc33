"""Additions to vLLM's server for LoLA models: routes, metrics, an inspector, launch and deployment.

The package installs as `lola_vllm.serving`. vLLM loads `plugin.py` in the API server and
`worker.py` in the workers. `engine.py` runs in the API server and calls methods of `worker.py` by
name.
"""
