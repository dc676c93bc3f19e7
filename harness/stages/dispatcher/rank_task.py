"""What one rank does for a case of the stage `dispatcher`: run it, judge its own tokens, say where rows went wrong.

The verdict is the dense layer: this rank's result has to equal, bit for bit, the layer on one rank that holds all
experts.  Distinct tokens per rank, distinct weights per slot, experts that do different things: no dispatcher fault
known passes that.  The rows received are looked at only to say where it went wrong.

Several dispatches live together and are combined in reverse order; another one follows when all are combined, since
what is kept between the two, a counter or a buffer, is right once.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core.case import parse_id
from moe_harness.harness.core.findings import RankReport
from moe_harness.harness.core.memory import Arena
from moe_harness.harness.core.ranked_subject import load_checked
from moe_harness.harness.core.ranked_task import (
    Rank,
    Refused,
    differing_rows,
    digest,
    enter,
    member_of_group,
)
from moe_harness.harness.stages.dispatcher import data, received_rows, volume
from moe_harness.harness.stages.dispatcher.cases import DispatcherCase
from moe_harness.reference.dispatcher import Batch, owned_experts

WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_IN_PLACE = [
    {
        "fault": "input modified in place",
        "evidence": "it was written to, so that its owner, and a later step of this dispatch, sees other values",
    }
]


def run(me: Rank, spec: dict[str, Any], seed: int) -> RankReport:
    """Task: spec = {"impl": ..., "case": id, "explain": bool}.  Returns a RankReport.

    With "explain" every rank tells what is odd about the rows it received, also where its own tokens are right.
    """
    _, check, case = parse_id(spec["case"])
    assert isinstance(case, DispatcherCase)
    subject = load_checked("dispatcher", spec["impl"])
    replicated = bool(getattr(subject, "requires_replicated_tokens", False))
    report = RankReport(me.rank)
    me, group = member_of_group(me, case.groups), me.rank % case.groups
    worlds = _worlds(check, case, replicated, group)
    keywords: dict[str, Any] = {"num_experts": case.E, "owner": worlds[0].owner.clone()}
    if case.copies:
        if not supports_copies(subject):
            report.rejected = "does not declare supports_copies, so it is not made with redundant experts"
            return report
        keywords["logical"] = worlds[0].logical.clone()
    given = {name: value.clone() for name, value in keywords.items() if isinstance(value, Tensor)}
    try:
        dispatcher = enter(me, subject, me.group, **keywords)
        limit = getattr(dispatcher, "max_live", None)
        worlds = worlds[: None if limit is None else max(1, limit)]  # a class that allows none is judged all the same
        later = data.build(case, replicated=replicated, group=group, values=2)
        _judge(me, dispatcher, worlds, later, case, report, bool(spec.get("explain")))
    except Refused as refusal:
        report.rejected = str(refusal)
    for name, before in given.items():
        if not torch.equal(keywords[name], before):
            report.fail("inputs", f"{name} was modified", diagnosis=_IN_PLACE)
    return report


def traits(me: Rank, spec: dict[str, str], seed: int) -> dict[str, bool]:
    """Task: whether spec["impl"] is to be judged with redundant experts too."""
    return {"copies": supports_copies(load_checked("dispatcher", spec["impl"]))}


def supports_copies(subject: Any) -> bool:
    """What a class declares."""
    return bool(getattr(subject, "supports_copies", False))


def _worlds(check: str, case: DispatcherCase, replicated: bool, group: int) -> list[data.World]:
    """What is dispatched before anything is combined: the case itself, for `live` two of other sizes and routing, and
    always one that differs from the case in its values alone, which fits wherever the case fits."""
    build = partial(data.build, replicated=replicated, group=group)
    worlds = [build(case)]
    if check == "live":
        for number, tokens in enumerate((other_tokens(case), case.T), 1):
            other = build(case.but(seed=case.seed + number, T=tokens))
            worlds.append(other.with_experts_of(worlds[0]))
    return [*worlds, build(case, values=1)]


def other_tokens(case: DispatcherCase) -> str:
    """Tokens of a second dispatch: other numbers on other ranks, so that nothing of the first fits it by chance."""
    return "+".join(str(max(0, tokens - 1)) for tokens in reversed(case.tokens))


@dataclass
class _Passed:
    """One dispatch that was combined."""

    world: data.World
    which: str  # as a finding tells it
    inputs: Arena
    d: Any
    output: Any = None
    expert_output: Arena | None = None


def _judge(
    me: Rank, dispatcher: Any, worlds: list[data.World], later: data.World, case: DispatcherCase, report: RankReport,
    explain: bool,
) -> None:  # fmt: skip
    """Dispatch all, combine in reverse order, then one more; at last look at everything."""
    for name in ("dispatch", "combine"):
        if not callable(getattr(dispatcher, name, None)):
            report.fail("contract", f"{type(dispatcher).__name__} has no method {name}")
    if report.findings:
        return
    layout = dict([case.layout.split(":")] if case.layout else [])
    passed: list[_Passed] = []
    first = f"of {len(worlds)}, combined in reverse order"
    for live, when in ((worlds, first), ([later], "after those were combined")):
        dispatched = _dispatched(me, dispatcher, live, when, layout, report, explain)
        if dispatched is None:
            return
        for one in reversed(dispatched):
            _combine(me, dispatcher, one, layout)
        passed += dispatched
    for call in me.recorder.started.values():
        told = f"rank {report.rank}, call {call}: started and never waited for, so that its result may come too late"
        report.fail("contract", told)
    me.recorder.injector.injection = None  # what follows belongs to the harness
    for one in passed:
        _check_result(me, one, report)
        _check_inputs(one, report)
    _check_volume(me, dispatcher, [*worlds, later], report)


def _dispatched(
    me: Rank, dispatcher: Any, worlds: list[data.World], when: str, layout: dict[str, str], report: RankReport,
    explain: bool,
) -> list[_Passed] | None:  # fmt: skip
    """Every world dispatched; None where what came out is not of the form that it has to have."""
    found = []
    for number, world in enumerate(worlds, 1):
        arena, batch = Arena(), world.batches[me.rank]._asdict()
        placed = [arena.place(name, t.to(me.device), layout.get(name, "contiguous")) for name, t in batch.items()]
        d = enter(me, dispatcher.dispatch, *placed)
        found.append(_Passed(world, f"dispatch {number} {when}: ", arena, d))
    for one in found:
        sound = _check_contract(me, one.d, one.world, report)
        if explain and hasattr(one.d, "topk_ids") and not one.world.has_copies:
            told = received_rows.explain(one.d, one.world, me.rank)
            report.observed["received"] = report.observed.get("received") or told
        if not sound:
            return None
    return found


def _combine(me: Rank, dispatcher: Any, one: _Passed, layout: dict[str, str]) -> None:
    one.expert_output, name = Arena(), "expert_output"
    values = _run_experts(one.d, one.world, me)
    placed = one.expert_output.place(name, values, layout.get(name, "contiguous"))
    one.output = enter(me, dispatcher.combine, placed, one.d)


def _check_contract(me: Rank, d: Any, world: data.World, report: RankReport) -> bool:
    """Attributes, shapes, dtypes and the range of the ids of what dispatch returned."""
    before = len(report.findings)
    tensors: list[Any] = [getattr(d, name, None) for name in Batch._fields]
    for name, tensor in zip(Batch._fields, tensors, strict=True):
        _check_form(f"d.{name} is", tensor, me, report)
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
    if not weights.is_floating_point():
        report.fail("contract", f"d.topk_weights is {_kind(weights)}, but should be floating point")
    local = len(owned_experts(world.owner, me.rank))
    if ids.dtype not in WHOLE or (ids.numel() and not -1 <= int(ids.min()) <= int(ids.max()) < local):
        found = f"{int(ids.min())}..{int(ids.max())}" if ids.numel() and ids.dtype in WHOLE else str(ids.dtype)
        report.fail("contract", f"d.topk_ids holds {found}, but should hold local ids in -1..{local - 1}")
    return len(report.findings) == before


def _check_form(told: str, value: Any, me: Rank, report: RankReport) -> None:
    """A dense tensor of two dimensions on the device of the rank: what all that follows can take."""
    if not isinstance(value, Tensor) or value.dim() != 2 or value.layout is not torch.strided:
        report.fail("contract", f"{told} {_kind(value)}, but should be a dense tensor of two dimensions")
    elif value.device.type != me.device.type:
        report.fail("contract", f"{told} on {value.device.type}, but should be on {me.device.type}")


def _kind(value: Any) -> str:
    if isinstance(value, Tensor) and value.layout is not torch.strided:
        return f"{value.dtype} of layout {value.layout}"
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _run_experts(d: Any, world: data.World, me: Rank) -> Tensor:
    """The local weighted sum of every received row, [S, H], exact; a row without a local slot is 0."""
    rows, weights, ids = d.hidden_states.cpu().double(), d.topk_weights.cpu().double(), d.topk_ids.cpu()
    out = torch.zeros_like(rows)
    at, slots = (ids >= 0).nonzero(as_tuple=True)
    order = ids[at, slots].long().argsort(stable=True)
    at, slots = at[order], slots[order]
    owned = world.logical[owned_experts(world.owner, me.rank)]
    sizes = ids[at, slots].long().bincount(minlength=len(owned)).tolist()
    for expert, t, s in zip(owned.tolist(), at.split(sizes), slots.split(sizes), strict=True):
        if len(t):
            out.index_add_(0, t, weights[t, s, None] * world.expert(expert, rows[t]))
    return out.to(d.hidden_states.dtype).to(me.device)


def _check_result(me: Rank, one: _Passed, report: RankReport) -> None:
    world, out, which = one.world, one.output, one.which
    own = world.batches[me.rank]
    before = len(report.findings)
    _check_form(f"{which}combine returned", out, me, report)
    if len(report.findings) > before:
        return
    if out.shape != own.hidden_states.shape or out.is_complex():
        report.fail("contract", f"{which}combine returned {_kind(out)}, but should be {_kind(own.hidden_states)}")
        return
    if torch.promote_types(out.dtype, own.hidden_states.dtype) != out.dtype:
        report.fail("contract", f"combine returned {out.dtype}, narrower than expert_output, {own.hidden_states.dtype}")
    parts = received_rows.contributions(world, me.rank)
    expected, got = parts.sum(0), out.cpu().double()
    report.observed["digest"] = report.observed.get("digest", "") + digest(got)
    wrong = differing_rows(got, expected)
    if out.numel():
        report.observed.setdefault("plain", []).append(received_rows.plain(out, own) if len(wrong) else [])
    if len(wrong):
        token = int(wrong[0])
        column = int(differing_rows(got[token, :, None], expected[token, :, None])[0])
        report.fail(
            "dense",
            f"{which}rank {report.rank}: {len(wrong)} of {len(expected)} tokens differ from the dense layer; first is "
            f"token {token}, column {column}: {got[token, column]:g}, but should be {expected[token, column]:g}",
            where={"rank": report.rank, "token": token, "column": column, "tokens": wrong.tolist()[:32]},
            diagnosis=[
                *([] if world.has_copies else received_rows.fit(got, parts, wrong)),
                *received_rows.displaced(got, world, me.rank, wrong),
            ],
        )


def _check_inputs(one: _Passed, report: RankReport) -> None:
    """Arguments unchanged, results in memory of their own."""
    arenas = [arena for arena in (one.inputs, one.expert_output) if arena is not None]
    for name, what in (violation for arena in arenas for violation in arena.violations()):
        report.fail("inputs", f"{name} {what}", diagnosis=_IN_PLACE)
    results = {f"d.{name}": getattr(one.d, name) for name in Batch._fields} | {"combine": one.output}
    for label, result in results.items():
        for arena in arenas if label == "combine" else arenas[:1]:
            if isinstance(result, Tensor) and (argument := arena.aliased_by(result)):
                report.fail("inputs", f"the result {label} shares memory with the argument {argument}")


def _check_volume(me: Rank, dispatcher: Any, worlds: list[data.World], report: RankReport) -> None:
    """Bytes sent against what the declared scheme needs for these ids, over all dispatches of the case."""
    scheme = None if worlds[0].has_copies else getattr(dispatcher, "scheme", None)
    sent = sum(call.sent for call in me.recorder.calls)
    report.observed |= {"sent": sent, "needed": None, "dispatches": len(worlds)}
    floors = [volume.floor(scheme, w.batches, w.owner, me.rank) for w in worlds] if isinstance(scheme, str) else []
    known = [bytes_needed for bytes_needed in floors if bytes_needed is not None]
    if not known:
        return
    report.observed["needed"] = needed = sum(known)
    if sent >= needed + len(worlds) * volume.CONTROL_BYTES * (me.world_size - 1) + 1:
        report.fail("volume", f"rank {report.rank} sent {sent:g} bytes, but {scheme} needs {needed:g} for these ids",
                    headroom=sent / needed if needed else None, where={"rank": report.rank})  # fmt: skip
