"""What one rank does for a case of the stage `dispatcher`: run it, judge its own tokens, say where rows went wrong.

The verdict is the dense layer: this rank's result has to equal, bit for bit, the layer on one rank that holds all
experts.  Distinct tokens per rank, distinct weights per slot, experts that do different things: no dispatcher fault
known passes that.  The rows received are looked at only to say where it went wrong.
"""

from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core.contracts import REJECTIONS
from moe_harness.harness.ranks import received_rows, volume, world_data
from moe_harness.harness.ranks.cases import DispatcherCase, parse_id
from moe_harness.harness.ranks.loading import load_class
from moe_harness.harness.ranks.results import Report, differing_rows, digest
from moe_harness.harness.ranks.worker import Rank
from moe_harness.reference.dispatcher import Batch, owned_experts


def run(me: Rank, spec: dict[str, Any], seed: int) -> dict[str, Any]:
    """Task: spec = {"impl": ..., "case": id, "explain": bool}.  Returns a Report as plain data.

    With "explain" every rank tells what is odd about the rows it received, also where its own tokens are right.
    """
    check, case = parse_id(spec["case"])
    assert isinstance(case, DispatcherCase)
    subject = load_class("dispatcher", spec["impl"])
    replicated = bool(getattr(subject, "requires_replicated_tokens", False))
    report = Report(me.rank)
    worlds = [world_data.build(case, replicated=replicated)]
    if check == "live":
        for number, tokens in enumerate((other_tokens(case), case.T), 1):
            other = world_data.build(case.but(seed=case.seed + number, T=tokens), replicated=replicated)
            worlds.append(other.with_experts_of(worlds[0]))
    try:
        dispatcher = subject(me.group, num_experts=case.E, owner=worlds[0].owner.clone())
        limit = getattr(dispatcher, "max_live", None)
        worlds = worlds[: None if limit is None else max(1, limit)]  # a class that allows none is judged all the same
        _judge(me, dispatcher, worlds, report, bool(spec.get("explain")))
    except REJECTIONS as error:
        if me.recorder.failed is not None:
            raise
        report.rejected = f"{type(error).__name__}: {error}"
    return report.as_dict()


def other_tokens(case: DispatcherCase) -> str:
    """Tokens of a second dispatch: other numbers on other ranks, so that nothing of the first fits it by chance."""
    return "+".join(str(max(0, tokens - 1)) for tokens in reversed(case.tokens))


def _judge(me: Rank, dispatcher: Any, worlds: list[world_data.World], report: Report, explain: bool) -> None:
    """Dispatch all, combine in reverse order, then look at everything."""
    for name in ("dispatch", "combine"):
        if not callable(getattr(dispatcher, name, None)):
            report.fail("contract", f"{type(dispatcher).__name__} has no method {name}")
    if report.findings:
        return
    inputs = [Batch(*(t.clone().to(me.device) for t in world.batches[me.rank])) for world in worlds]
    dispatched = [dispatcher.dispatch(*batch) for batch in inputs]
    for world, d in zip(worlds, dispatched, strict=True):
        sound = _check_contract(me, d, world, report)
        if explain and hasattr(d, "topk_ids"):
            report.observed["received"] = received_rows.explain(d, world, me.rank)
        if not sound:
            return
    outputs: list[Tensor] = []
    for number in reversed(range(len(worlds))):
        expert_output = _run_experts(dispatched[number], worlds[number], me)
        given = expert_output.clone()
        outputs.insert(0, dispatcher.combine(expert_output, dispatched[number]))
        if not torch.equal(given.view(torch.uint8), expert_output.view(torch.uint8)):
            report.fail("inputs", "expert_output was modified by combine")
    for call in me.recorder.started.values():
        told = f"rank {me.rank}, call {call}: started and never waited for, so that its result may come too late"
        report.fail("contract", told)
    me.recorder.injector.injection = None  # what follows belongs to the harness
    for number, world in enumerate(worlds):
        which = "" if len(worlds) == 1 else f"dispatch {number + 1} of {len(worlds)}, combined in reverse order: "
        _check_result(me, outputs[number], world, dispatched[number], report, which)
        _check_inputs(inputs[number], world.batches[me.rank], dispatched[number], outputs[number], report)
    if len(worlds) == 1:
        _check_volume(me, dispatcher, worlds[0], report)


def _check_contract(me: Rank, d: Any, world: world_data.World, report: Report) -> bool:
    """Attributes, shapes, dtypes and the range of the ids of what dispatch returned."""
    before = len(report.findings)
    tensors: list[Any] = [getattr(d, name, None) for name in Batch._fields]
    for name, tensor in zip(Batch._fields, tensors, strict=True):
        if not isinstance(tensor, Tensor) or tensor.dim() != 2:
            report.fail("contract", f"d.{name} is {_kind(tensor)}, but should be a tensor of two dimensions")
    if len(report.findings) > before:
        return False
    hidden, weights, ids = tensors
    own = world.batches[me.rank]
    if hidden.shape[1] != own.hidden_states.shape[1] or hidden.dtype != own.hidden_states.dtype:
        report.fail("contract", f"d.hidden_states is {_kind(hidden)}, but should be {own.hidden_states.dtype} "
                    f"with {own.hidden_states.shape[1]} columns")  # fmt: skip
    if weights.shape != ids.shape or len(ids) != len(hidden):
        shapes = f"{list(hidden.shape)}, {list(weights.shape)}, {list(ids.shape)}"
        report.fail("contract", f"hidden_states, topk_weights, topk_ids of d are {shapes}, but should agree in rows")
    local = len(owned_experts(world.owner, me.rank))
    if ids.is_floating_point() or (ids.numel() and not -1 <= int(ids.min()) <= int(ids.max()) < local):
        found = f"{int(ids.min())}..{int(ids.max())}" if ids.numel() else str(ids.dtype)
        report.fail("contract", f"d.topk_ids holds {found}, but should hold local ids in -1..{local - 1}")
    return len(report.findings) == before


def _kind(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _run_experts(d: Any, world: world_data.World, me: Rank) -> Tensor:
    """The local weighted sum of every received row, [S, H], exact; a row without a local slot is 0."""
    rows, weights, ids = d.hidden_states.cpu().double(), d.topk_weights.cpu().double(), d.topk_ids.cpu()
    out = torch.zeros_like(rows)
    for local, expert in enumerate(owned_experts(world.owner, me.rank).tolist()):
        at, slots = (ids == local).nonzero(as_tuple=True)
        out.index_add_(0, at, weights[at, slots, None] * world.expert(expert, rows[at]))
    return out.to(d.hidden_states.dtype).to(me.device)


def _check_result(me: Rank, out: Any, world: world_data.World, d: Any, report: Report, which: str) -> None:
    own = world.batches[me.rank]
    if not isinstance(out, Tensor) or out.shape != own.hidden_states.shape:
        report.fail("contract", f"{which}combine returned {_kind(out)}, but should be {_kind(own.hidden_states)}")
        return
    if torch.promote_types(out.dtype, own.hidden_states.dtype) != out.dtype:
        report.fail("contract", f"combine returned {out.dtype}, narrower than expert_output, {own.hidden_states.dtype}")
    parts = received_rows.contributions(world, me.rank)
    expected, got = parts.sum(0), out.cpu().double()
    report.observed["digest"] = report.observed.get("digest", "") + digest(got)
    wrong = differing_rows(got, expected)
    if len(wrong):
        token = int(wrong[0])
        column = int(differing_rows(got[token, :, None], expected[token, :, None])[0])
        report.fail(
            "dense",
            f"{which}rank {me.rank}: {len(wrong)} of {len(expected)} tokens differ from the dense layer; first is "
            f"token {token}, column {column}: {got[token, column]:g}, but should be {expected[token, column]:g}",
            where={"rank": me.rank, "token": token, "column": column, "tokens": wrong.tolist()[:32]},
            diagnosis=[
                *received_rows.fit(got, parts, wrong),
                *received_rows.displaced(got, world, me.rank, wrong),
            ],
        )


def _check_inputs(given: Batch, original: Batch, d: Any, out: Tensor, report: Report) -> None:
    """Arguments unchanged, results in memory of their own."""
    for name, after, before in zip(Batch._fields, given, original, strict=True):
        same = torch.equal(after.cpu().contiguous().view(torch.uint8), before.contiguous().view(torch.uint8))
        if not same:
            report.fail("inputs", f"{name} was modified")
        for label, result in (("d.hidden_states", d.hidden_states), ("d.topk_ids", d.topk_ids), ("combine", out)):
            if after.numel() and isinstance(result, Tensor) and _memory(result) == _memory(after):
                report.fail("inputs", f"the result {label} shares memory with the argument {name}")


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _check_volume(me: Rank, dispatcher: Any, world: world_data.World, report: Report) -> None:
    """Bytes sent against what the declared scheme needs for these ids."""
    scheme = getattr(dispatcher, "scheme", None)
    needed = volume.floor(scheme, world.batches, world.owner, me.rank) if isinstance(scheme, str) else None
    sent = sum(call.sent for call in me.recorder.calls)
    report.observed["sent"], report.observed["needed"] = sent, needed
    if needed is not None and sent >= needed + volume.CONTROL_BYTES * (me.world_size - 1) + 1:
        report.fail("volume", f"rank {me.rank} sent {sent:g} bytes, but {scheme} needs {needed:g} for these ids",
                    headroom=sent / needed if needed else None, where={"rank": me.rank})  # fmt: skip
