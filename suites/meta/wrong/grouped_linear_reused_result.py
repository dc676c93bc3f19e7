"""A product whose result of one group is a view of a workspace: the next call changes it."""

import torch

_workspace = {}


def one_group_writes_the_workspace(x, weight, group_sizes, *, bias=None):
    sizes = group_sizes.tolist()
    rows = x.float().split(sizes)
    out = torch.cat([r @ w.float().mT for r, w in zip(rows, weight, strict=True)])
    if bias is not None:
        out = out + bias.float().repeat_interleave(group_sizes.long(), 0)
    out = out.to(x.dtype)
    if sum(size > 0 for size in sizes) != 1:
        return out
    kept = _workspace.setdefault((out.shape[1], out.dtype), torch.empty(4096, out.shape[1], dtype=out.dtype))
    kept[: len(out)] = out
    return kept[: len(out)]
