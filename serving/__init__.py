"""What a LoLA server has beside vLLM's own API: routes, metrics, an inspector, launch and deploy.

Installs as `lola_vllm.serving`. vLLM loads `plugin.py` in the API server and `worker.py` in the
workers; they meet in `engine.py`, which calls the one from the other by name.
"""
