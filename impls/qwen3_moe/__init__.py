"""Decoders of Qwen3-MoE and its kin from safetensors to tokens: a small inference engine over our kernels.

Families: Qwen3-MoE, Qwen2-MoE, dense Qwen3, the Qwen3-Omni talker, DeepSeek-V2, Qwen3-Next (`config.ARCHITECTURES`).

In the order to read it:  config, rope, weights, loader (a folder becomes tensors)  ·  kernels, network, latent,
linear_attention (tensors become logits)  ·  pages, sequence, scheduler (who runs next)  ·  batch, runner, engine (steps
on the device)  ·  model (the contract).  Over ranks:  placement, ranks, expert_layouts, lockstep.
"""
