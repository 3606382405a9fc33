"""What a step of a LoLA model would take on a GPU, by count: `lola-vllm estimate --gpu NAME`."""
