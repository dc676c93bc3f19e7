"""FlashInfer's fused MoE kernels, from the package flashinfer-python.  Used where installed."""
