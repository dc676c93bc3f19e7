"""Reductions in styles of their own; all of them are right."""

import threading

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate


def parts_of(routed, shared, states):
    return [(routed, states[0])] + ([] if shared is None else [(shared, states[1])])


def one_by_one(total):
    """Each part by itself, partial ones through `total(part, group)`."""

    def reduction(routed, shared, group, *, routed_state, shared_state=None, rows=None):
        out = []
        for part, state in parts_of(routed, shared, (routed_state, shared_state)):
            part = total(part, group) if state == "partial" else part
            out.append(part.split(rows)[dist.get_rank(group)] if state != "complete" and rows is not None else part)
        return out[0].clone() if len(out) == 1 else out[1] + out[0]

    return reduction


def _scattered_and_gathered(x, group):
    """Elements in equal blocks, padded with zeros."""
    ranks = dist.get_world_size(group)
    each = -(-x.numel() // ranks)
    padded, own = x.new_zeros(each * ranks), x.new_empty(each)
    padded[: x.numel()] = x.reshape(-1)
    dist.reduce_scatter_tensor(own, padded, group=group)
    dist.all_gather_into_tensor(padded, own, group=group)
    return padded[: x.numel()].reshape(x.shape)


def _method(x, group):
    x = x.clone()
    group.allreduce([x]).wait()
    return x


def _in_a_thread(x, group):
    x = x.clone()
    thread = threading.Thread(target=lambda: dist.all_reduce(x, group=group))
    thread.start()
    thread.join()
    return x


def _to_the_last_and_back(x, group):
    x, root = x.contiguous().clone(), dist.get_world_size(group) - 1
    dist.reduce(x, group=group, group_dst=root)
    dist.broadcast(x, group=group, group_src=root)
    return x


def _letters(x, group):
    """Every part to every rank, summed in fp64 from the last rank to the first."""
    ranks, me, x = dist.get_world_size(group), dist.get_rank(group), x.contiguous()
    got = [x if rank == me else torch.empty_like(x) for rank in range(ranks)]
    posts = []
    for rank in (rank for rank in range(ranks) if rank != me):
        peer = dist.get_global_rank(group, rank)
        posts += [dist.P2POp(dist.isend, x, peer, group), dist.P2POp(dist.irecv, got[rank], peer, group)]
    for work in dist.batch_isend_irecv(posts) if posts else ():
        work.wait()
    return sum(part.double() for part in reversed(got)).to(x.dtype)


def _as_dtensor(x, group):
    mesh = DeviceMesh.from_group(group, "cpu")
    return DTensor.from_local(x, mesh, [Partial()], run_check=False).redistribute(mesh, [Replicate()]).to_local()


scattered_and_gathered = one_by_one(_scattered_and_gathered)
by_functional = one_by_one(lambda x, group: functional.wait_tensor(functional.all_reduce(x, "sum", group)))
by_method = one_by_one(_method)
in_a_thread = one_by_one(_in_a_thread)
to_the_last_and_back = one_by_one(_to_the_last_and_back)
letters = one_by_one(_letters)
as_dtensor = one_by_one(_as_dtensor)


def own_rows_by_all_to_all(routed, shared, group, *, routed_state, shared_state=None, rows=None):
    """With rows each rank is sent its own rows of every part, and nothing else."""
    if rows is None:
        return by_method(routed, shared, group, routed_state=routed_state, shared_state=shared_state)
    me, ranks = dist.get_rank(group), dist.get_world_size(group)
    out = routed.new_zeros(rows[me], routed.shape[1])
    for x, state in parts_of(routed, shared, (routed_state, shared_state)):
        if state == "partial":
            got = x.new_empty(rows[me] * ranks, x.shape[1])
            dist.all_to_all_single(got, x.contiguous(), [rows[me]] * ranks, rows, group=group)
            x = got.view(ranks, rows[me], x.shape[1]).sum(0)
        out += x.split(rows)[me] if state == "replicated" else x
    return out


def all_in_one(routed, shared, group, *, routed_state, shared_state=None, rows=None):
    """One sum for everything: what is replicated counts on the first rank alone."""
    if routed_state == "complete":
        return by_method(routed, shared, group, routed_state=routed_state, shared_state=shared_state, rows=rows)
    total = torch.zeros(routed.shape, dtype=routed.dtype)
    for x, state in parts_of(routed, shared, (routed_state, shared_state)):
        if state == "partial" or dist.get_rank(group) == 0:
            total += x
    dist.all_reduce(total, group=group)
    return total if rows is None else total.split(rows)[dist.get_rank(group)].clone()


def _seen_flat(x, group):
    flat = x.view(-1).clone()
    dist.all_reduce(flat, group=group)
    return flat.view(x.shape)


seen_flat = one_by_one(_seen_flat)  # torch refuses to view rows that do not lie one behind the other


def masked_by_a_product(routed, shared, group, *, routed_state, shared_state=None, rows=None):
    """What is replicated counts once, by a factor of 0 or 1: an infinity becomes NaN where it stands."""
    if routed_state == "complete":
        return by_method(routed, shared, group, routed_state=routed_state, shared_state=shared_state, rows=rows)
    once = float(dist.get_rank(group) == 0)
    total = sum(
        x * (1.0 if state == "partial" else once) for x, state in parts_of(routed, shared, (routed_state, shared_state))
    ).contiguous()
    dist.all_reduce(total, group=group)
    return total if rows is None else total.split(rows)[dist.get_rank(group)].clone()
