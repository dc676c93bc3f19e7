"""DeepSeek-V2's block that limits groups wherever the config names some, also with topk_method "greedy"."""

from moe_harness.reference.moe_block import moe_block


def groups_wherever_there_are_some(hidden_states, weights, config):
    if config.get("topk_method") == "greedy" and (config.get("n_group") or 1) > 1:
        config = config | {"topk_method": "group_limited_greedy"}
    return moe_block(hidden_states, weights, config)
