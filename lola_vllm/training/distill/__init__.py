"""Distilling a Llama into LoLA: data, the two stages, and what they keep on disk."""
