"""Who answers: found by a spec, asked in batches.

transformers:eager, transformers:grouped_mm, transformers:moe_harness_triton
    transformers' model of the checkpoint with that experts implementation
triton, torch:loop, kernel.py:experts, and of whole blocks kernel.py:moe_block
    transformers' model with that function in every layer; SPEC@3: in layer 3 alone
qwen3_moe, engine.py:load_model
    an implementation of the stage model
hflm:eager
    lm-eval's own HFLM around transformers' model (no gold answers)
http://host:port/v1#model
    a server that speaks OpenAI's completions
"""

from moe_harness.harness.gate.answerers.finding import Answerer, Settings, find, glance

__all__ = ["Answerer", "Settings", "find", "glance"]
