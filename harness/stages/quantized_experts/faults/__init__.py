"""Faults of the stage `quantized_experts`."""
