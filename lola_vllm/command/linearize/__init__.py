"""`lola-vllm linearize`: a LoLA model of any supported base, by one command."""
