"""The signature of an implementation of the stage `paged_attention`."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# What `rounds` may hold without being asked: softmax weights before they meet the values (every flash attention stores
# them in 16 bits), and the results of the parts that a sequence is split into.
ROUNDINGS = ("probability", "partial_sum")
# What has to be declared to be accepted, since it costs digits that no kernel needs to give up.
DECLARED_ONLY = ("score", "scaled_query")


def paged_attention(
    q: "Tensor", key_cache: "Tensor", value_cache: "Tensor", block_table: "Tensor", query_start: "Tensor",
    context_len: "Tensor", *, scale: float,
) -> "Tensor": ...  # fmt: skip
