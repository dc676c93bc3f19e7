r"""Causal attention over pages of compressed keys and values (MLA) in plain PyTorch.

    out[t] = softmax(scale * q[t] . C[: p + 1]) C[: p + 1, : rank]      p the position of token t

All heads share one row C[s] of a position: its first `rank` numbers are the value too.
"""

from torch import Tensor

from moe_harness.impls.torch.paged_attention import paged_attention

__all__ = ["latent_attention"]


def latent_attention(
    q: Tensor, cache: Tensor, block_table: Tensor, query_start: Tensor, context_len: Tensor, *, scale: float, rank: int
) -> Tensor:
    """The weighted sum of latents of every query head.

    Args:
        q: [T, Hq, W], the query brought into the latent space beside its turned part.
        cache: [P, page, 1, W], W = rank + turned dimensions.
        block_table, query_start, context_len: as in the stage `paged_attention`.

    Returns:
        [T, Hq, rank] in at least the dtype of q.

    Raises:
        ValueError: shapes that do not fit together.
    """
    mixed = paged_attention(q, cache, cache, block_table, query_start, context_len, scale=scale)
    return mixed[..., :rank]
