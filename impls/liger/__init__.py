"""Liger's fused MoE kernels, from the package liger-kernel.  An extra: they need a CUDA device."""
