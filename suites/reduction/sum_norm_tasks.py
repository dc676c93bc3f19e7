"""What one rank does to check the sum over ranks with residual and norm: calls in a given order of arrival, compared.

total = ((part_0 + part_1) + ... + part_{R-1}) + residual     fp32, rounded once: one right bit pattern
out   = rms_norm(total)                                       within the bound of the stage rms_norm
"""

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core.bounds import DTYPES
from moe_harness.harness.core.call import Call
from moe_harness.harness.core.ranked_task import Rank, digest
from moe_harness.harness.stages.rms_norm.cases import RmsNormCase
from moe_harness.harness.stages.rms_norm.stage import STAGE
from moe_harness.suites.reduction.interpreted import RETURNED, Script, SumNorm, Until, changed, planted
from moe_harness.suites.reduction.planted_sum_norm import FAULTS

EPS = 0.5  # beside mean squares of about 1, so that no place of eps is like another
QUIET = 0.2  # seconds
SHAPES = ((3, 24), (1, 24), (2, 33), (3, 24), (0, 24), (2, 24))
WIDE = (2, 3)  # calls whose weight is fp32, and no 16-bit number, as 1 + what a checkpoint holds is
PIECES = (0, 1, 0, 2, 0, 0)  # fp32 pieces as which the part of each call is handed in; those calls have a residual


def drawn(ranks: int, rows: int, width: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Parts [R, T, H], residual [T, H] and weight [H], the same on every rank."""
    random = torch.Generator().manual_seed(seed)
    parts, residual, weight = (
        torch.randn(*shape, generator=random).to(dtype) for shape in ((ranks, rows, width), (rows, width), (width,))
    )
    return parts * 0.4, residual, weight


def in_pieces(parts: Tensor, count: int) -> Tensor | None:
    """fp32 [R, count, T, H], sums of which no fp16 or bf16 holds; None where the parts are handed in as they are."""
    if not count:
        return None
    first = parts.float() * (1 + 2.0**-11)
    return torch.stack([first / count] * count, 1)


def expected(parts: Tensor, residual: Tensor | None) -> Tensor:
    total = torch.zeros(parts.shape[1:])
    for part in parts:
        total = total + part.float()
    return (total if residual is None else total + residual.float()).to(parts.dtype)


def late_second_rank(me: Rank) -> Script:
    """In every call rank 1 comes when rank 0 waits for it already, and reads when rank 0 is in the next call.

    Rank 0 has raised R flags then, seen its own, and looked for rank 1's several times, or has returned.
    """
    if me.rank != 1:
        return Script(me.group, {}, {})
    raised, last = me.world_size, len(SHAPES) - 1

    def waits_for_me(call: int) -> Until:
        return lambda seen: bool(seen[0, call] >= raised + 6)

    def is_ahead(call: int) -> Until:
        return lambda seen: bool(seen[0, call + 1] > raised or (call == last and seen[0, call] > RETURNED))

    calls = range(len(SHAPES))
    return Script(me.group, {c: waits_for_me(c) for c in calls}, {(c, raised): is_ahead(c) for c in calls})


def announced_early(me: Rank) -> Script:
    """In every call rank 1 tells how many rows it has, and puts them only when rank 0 has long heard of it.

    For a kernel that announces before it puts, which is as right.  Rank 0 has heard when it has looked at nothing that
    is announced for QUIET: it waits for words then, or has taken those that were there.
    """
    if me.rank != 1:
        return Script(me.group, {}, {})

    def waits_for_me(call: int) -> Until:
        return lambda seen: bool(seen[0, call] >= me.world_size + 6)

    def is_quiet(call: int) -> Until:
        last = [-1, 0.0]  # how often rank 0 has looked, and since when no more

        def quiet(seen: Tensor) -> bool:
            count, now = int(seen[0, call]), time.monotonic()
            if count != last[0]:
                last[:] = [count, now]
            return now - last[1] > QUIET

        return quiet

    calls = range(len(SHAPES))
    return Script(me.group, {c: waits_for_me(c) for c in calls}, {(c, me.world_size): is_quiet(c) for c in calls})


def summing(me: Rank, spec: dict[str, Any]) -> SumNorm:
    """The sum with the fault of a spec, in the protocol that it names."""
    changes = FAULTS[spec["fault"]].changes if "fault" in spec else ()
    kernels = [changed(changes)] if changes else []
    return SumNorm(me.group, *kernels, programs=1, words=spec.get("words", True))


def run(me: Rank, spec: dict[str, Any], seed: int) -> dict[str, Any]:
    """Task: complaints about one rank's results, and a digest of all of them."""
    through = summing(me, spec)
    through._workspace()  # a collective, before anybody is late
    told, results = [], []
    with (announced_early if spec.get("early") else late_second_rank)(me) as script:
        for number, (rows, width) in enumerate(SHAPES):
            parts, residual, weight = drawn(me.world_size, rows, width, DTYPES[spec["dtype"]], seed + number)
            weight = weight.float() * (1 + 2.0**-11) if number in WIDE else weight
            added = residual if number % 3 < 2 else None
            pieces = in_pieces(parts, PIECES[number])
            given = parts[me.rank].clone() if pieces is None else pieces[me.rank].clone()
            if pieces is not None:
                parts = pieces.sum(1).to(parts.dtype)
            before = given.clone()
            with script.calling():
                if pieces is None:
                    out, total = through(given, weight, eps=EPS, residual=added)
                else:
                    out, total = through.of_pieces(given, weight, eps=EPS, residual=residual)
            results.append((number, out, total, expected(parts, added), weight))
            told += ["the part was written"] if not torch.equal(given, before) else []
    for number, out, total, wanted, weight in results:  # at the end, so that no later call may change them
        told += [f"call {number}: {line}" for line in _complaints(out, total, wanted, weight)]
    return {"told": told, "digest": digest(torch.cat([part.flatten() for r in results for part in r[1:3]]))}


def _complaints(out: Tensor, total: Tensor, wanted: Tensor, weight: Tensor) -> Iterator[str]:
    if not torch.equal(total, wanted):
        yield f"total is {int((total != wanted).sum())} of {wanted.numel()} times another number than the sum in order"
    elif total.numel():
        call = Call(RmsNormCase(), {"x": total, "weight": weight}, {"eps": EPS, "residual": None})
        yield from (f"out: {finding.message}" for finding in STAGE.judge(call, out, ()).findings)


def other_rows(me: Rank, spec: dict[str, Any], seed: int) -> list[str]:
    """Rank 1 has one row less than the others: nobody may take the sum for one."""
    through = summing(me, spec)
    rows = 3 - (me.rank == 1)
    _, total = through(torch.ones(rows, 16))
    return [] if bool(total.isnan().all()) else ["the ranks' rows differ, wanted NaN"]


def not_planted(me: Rank, spec: dict[str, Any], seed: int) -> list[str]:
    """The faults of which a change does not find its text."""
    return [name for name, fault in FAULTS.items() if not planted(fault.changes)]
