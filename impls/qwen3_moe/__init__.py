"""Qwen3-MoE, Qwen2-MoE and dense Qwen3 from safetensors to tokens: a small inference engine over our kernels.

In the order to read it:  config, weights, loader (a folder becomes tensors)  ·  kernels, network (tensors become
logits) ·  pages, sequence, scheduler (who runs next)  ·  batch, runner, engine (steps on the device)  ·  model (the
contract).
"""
