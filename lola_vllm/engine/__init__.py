"""Where LoLA models run: vLLM and transformers."""
