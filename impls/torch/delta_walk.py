r"""The gated delta rule (Yang et al., https://arxiv.org/abs/2412.06464) over sequences that lie one behind the other.

S_t = decay_t S_{t-1} + k_t (beta_t (v_t - (decay_t S_{t-1})^T k_t))^T        out_t = S_t^T q_t
"""

import torch
from torch import Tensor

__all__ = ["delta_walk"]


def delta_walk(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, matrices: Tensor, rows: Tensor, query_start: Tensor,
    positions: Tensor,
) -> Tensor:  # fmt: skip
    """What is read at every token, [T, Hv, Dv]; all sequences go side by side, one position after the other.

    Args:
        q, k: [T, Hk, Dk], v: [T, Hv, Dv], decay, beta: [T, Hv], all in one dtype.
        matrices: [R, Hv, Dk, Dv], by row; left behind each sequence's last token.
        rows: int64 [S], of each sequence, which begins with nothing at position 0.
        query_start: int [S + 1]; positions: int [T].
    """
    start = query_start.long()
    lengths = start[1:] - start[:-1]
    place = torch.arange(int(lengths.max()), device=start.device)
    live = place < lengths[:, None]  # [S, L]
    at = (start[:-1, None] + place).masked_fill(~live, 0)
    group = v.shape[1] // k.shape[1]
    state = matrices[rows].masked_fill((positions[at[:, 0]] == 0)[:, None, None, None], 0)
    out = torch.empty_like(v)
    for t in place.tolist():
        of_key, of_query = (part[at[:, t]].repeat_interleave(group, dim=1) for part in (k, q))
        faded = decay[at[:, t], :, None, None] * state
        told = torch.einsum("shkv,shk->shv", faded, of_key)
        written = beta[at[:, t], :, None] * (v[at[:, t]] - told)
        new = faded + of_key[..., None] * written[:, :, None]
        state = torch.where(live[:, t, None, None, None], new, state)
        out[at[live[:, t], t]] = torch.einsum("shkv,shk->shv", state, of_query)[live[:, t]]
    matrices[rows] = state
    return out
