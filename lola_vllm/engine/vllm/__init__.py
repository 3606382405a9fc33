"""All that touches vLLM: registration hooks, the block manager, the attention layer, the model."""
