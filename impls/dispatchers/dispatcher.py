"""The registered names: `dispatchers:naive` is the class `naive` here, and so on.

A dispatcher moves tokens to the ranks that own their experts and the partial results back:

    d = dispatcher.dispatch(hidden_states, topk_weights, topk_ids)      rows this rank runs, with local expert ids
    y = dispatcher.combine(expert_output, d)                            sums over ranks, own tokens in their order
"""

from moe_harness.impls.dispatchers.all_to_all import AllToAll as all_to_all
from moe_harness.impls.dispatchers.all_to_all_dedup import AllToAllDedup as all_to_all_dedup
from moe_harness.impls.dispatchers.allgather_reducescatter import AllgatherReducescatter as allgather_reducescatter
from moe_harness.impls.dispatchers.deepep import DeepEP as deepep
from moe_harness.impls.dispatchers.local_allreduce import LocalAllreduce as local_allreduce
from moe_harness.impls.dispatchers.masked import Masked as masked
from moe_harness.impls.dispatchers.naive import Naive as naive
from moe_harness.impls.dispatchers.symmetric import Symmetric as symmetric

__all__ = [
    "naive",
    "local_allreduce",
    "allgather_reducescatter",
    "all_to_all",
    "all_to_all_dedup",
    "masked",
    "symmetric",
    "deepep",
]
