"""The registered names: `dispatchers:naive` is the class `naive` here, and so on.

A dispatcher moves tokens to the ranks that own their experts and the partial results back:

    d = dispatcher.dispatch(hidden_states, topk_weights, topk_ids)      rows this rank runs, with local expert ids
    y = dispatcher.combine(expert_output, d)                            sums over ranks, own tokens in their order
"""

from impls.dispatchers.all_to_all import AllToAll as all_to_all
from impls.dispatchers.all_to_all_dedup import AllToAllDedup as all_to_all_dedup
from impls.dispatchers.allgather_reducescatter import AllgatherReducescatter as allgather_reducescatter
from impls.dispatchers.deepep import DeepEP as deepep
from impls.dispatchers.local_allreduce import LocalAllreduce as local_allreduce
from impls.dispatchers.masked import Masked as masked
from impls.dispatchers.naive import Naive as naive
from impls.dispatchers.symmetric import Symmetric as symmetric

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
