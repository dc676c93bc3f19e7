"""The stage `quantized_experts`: the routed experts for weights as they are shipped."""
