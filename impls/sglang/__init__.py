"""SGLang's MoE kernels, from the packages sglang and sglang-kernel.  Used where installed."""
