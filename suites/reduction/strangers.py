"""Reductions as strangers write them: one that is right as far as it goes, the others wrong."""

import torch
import torch.distributed as dist


def tensor_parallel_only(routed, shared, group, *, routed_state, shared_state=None, rows=None):
    """Partial parts of all tokens, nothing else."""
    if routed_state != "partial" or shared_state not in (None, "partial") or rows is not None:
        raise NotImplementedError("only partial sums of all tokens")
    out = routed.clone() if shared is None else routed + shared
    dist.all_reduce(out, group=group)
    return out


def _total(part, group):
    part = part.clone()
    dist.all_reduce(part, group=group)
    return part


def _right(routed, shared, group, states, rows, total=_total):
    parts = [(routed, states[0])] + ([] if shared is None else [(shared, states[1])])
    out = 0
    for part, state in parts:
        if state == "partial":
            part = total(part, group)
        if state != "complete" and rows is not None:
            part = part.split(rows)[dist.get_rank(group)]
        out = out + part
    return out.clone()


def returns_the_input(routed, shared, group, *, routed_state, shared_state=None, rows=None):
    if routed_state == "complete" and shared is None:
        return routed
    return _right(routed, shared, group, (routed_state, shared_state), rows)


def writes_the_input(routed, shared, group, *, routed_state, shared_state=None, rows=None):
    if routed_state == "partial" and shared is None and rows is None:
        dist.all_reduce(routed, group=group)
        return routed.clone()
    return _right(routed, shared, group, (routed_state, shared_state), rows)


BUFFERS = {}


def same_buffer(routed, shared, group, *, routed_state, shared_state=None, rows=None):
    out = _right(routed, shared, group, (routed_state, shared_state), rows)
    return BUFFERS.setdefault((out.shape, out.dtype), torch.empty_like(out)).copy_(out)


def double(routed, shared, group, *, routed_state, shared_state=None, rows=None):
    return _right(routed, shared, group, (routed_state, shared_state), rows).double()


def unwaited(routed, shared, group, *, routed_state, shared_state=None, rows=None):
    unwaited.last = dist.all_reduce(torch.ones(1), group=group, async_op=True)
    return _right(routed, shared, group, (routed_state, shared_state), rows)


def skips_empty(routed, shared, group, *, routed_state, shared_state=None, rows=None):
    """A rank that keeps no rows takes part in nothing."""
    if rows is not None and rows[dist.get_rank(group)] == 0 and sum(rows):
        return routed[:0].clone()
    return _right(routed, shared, group, (routed_state, shared_state), rows)


def summed_by(total):
    """Partial parts through `total(part, group)`, all else as it should be."""

    def reduction(routed, shared, group, *, routed_state, shared_state=None, rows=None):
        return _right(routed, shared, group, (routed_state, shared_state), rows, total)

    return reduction


def _every_second_is_the_one_before(part, group):
    key = (part.shape, part.dtype)
    kept = BUFFERS.pop(key, None)
    if kept is None:
        BUFFERS[key] = part.clone()
    return _total(part if kept is None else kept, group)


def _first_columns(part, group):
    out = part.clone()
    out[:, :1024] = _total(part[:, :1024].contiguous(), group)
    return out


def _up_to_a_buffer(part, group):
    out, fits = part.flatten().clone(), (1 << 19) // part.element_size()
    out[:fits] = _total(out[:fits], group)
    return out.view(part.shape)


def _as_it_lies(part, group):
    return _total(part.as_strided(part.shape, (part.shape[1], 1)).clone(), group)


half_of_the_buffer_not_written = summed_by(_every_second_is_the_one_before)
through_bf16 = summed_by(lambda part, group: _total(part.bfloat16(), group).to(part.dtype))
through_fp16 = summed_by(lambda part, group: _total(part.half(), group).to(part.dtype))
a_block_of_columns = summed_by(_first_columns)
a_buffer_too_small = summed_by(_up_to_a_buffer)
strides_ignored = summed_by(_as_it_lies)
averaged = summed_by(lambda part, group: _total(part, group) / dist.get_world_size(group))


def writes_rows(routed, shared, group, *, routed_state, shared_state=None, rows=None):
    out = _right(routed, shared, group, (routed_state, shared_state), rows)
    if rows is not None:
        rows.append(0)
    return out


def cleaned(routed, shared, group, *, routed_state, shared_state=None, rows=None):
    return _right(routed, shared, group, (routed_state, shared_state), rows).nan_to_num()


def picked_by_a_product(routed, shared, group, *, routed_state, shared_state=None, rows=None):
    """Own rows by a product with 0 and 1."""
    if rows is None or routed_state != "partial" or shared is not None:
        return _right(routed, shared, group, (routed_state, shared_state), rows)
    me, total = dist.get_rank(group), _total(routed, group)
    return torch.eye(len(total), dtype=total.dtype)[sum(rows[:me]) : sum(rows[: me + 1])] @ total
