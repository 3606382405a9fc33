"""LoLA's Triton kernels, installed as `lola_vllm.kernels`. Import a module to compile with it."""
