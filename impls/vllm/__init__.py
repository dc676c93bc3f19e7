"""vLLM's MoE kernels, from the package vllm.  Used where installed."""
