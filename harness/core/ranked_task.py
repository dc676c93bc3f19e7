"""What the task of one rank is written with: who it is, and how it enters code under judgement."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import sha1
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from moe_harness.harness.core import blame
from moe_harness.harness.core.blame import kept_defaults
from moe_harness.harness.core.contracts import REJECTIONS
from moe_harness.harness.core.findings import RankReport

_MADE: dict[tuple[int, int], list[dist.ProcessGroup]] = {}  # by world size and number of groups


class Recording(Protocol):
    """What is known of the collectives of a job so far."""

    calls: list[Any]  # in the order in which they were entered
    started: dict[int, Any]  # those that nobody has waited for yet, by their number
    failed: Any  # the one that raised, if any
    injector: Any  # what disturbs them on purpose


@dataclass(frozen=True)
class Rank:
    """What a task is given: who it is and where its tensors live."""

    rank: int
    world_size: int
    backend: str
    recorder: Recording
    group: dist.ProcessGroup
    folder: str = ""  # for files; all ranks' where they are on one machine

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", torch.cuda.current_device()) if self.backend == "nccl" else torch.device("cpu")


def member_of_group(me: Rank, groups: int) -> Rank:
    """This rank as a member of one of `groups` equal groups of the world, with its number in there.

    Group g holds the ranks g, g + groups, g + 2 groups, ...: no rank but the first is what it is in the world.
    """
    if groups == 1:
        return me
    if (me.world_size, groups) not in _MADE:  # every rank makes all of them, in the same order
        _MADE[me.world_size, groups] = [
            dist.new_group(list(range(first, me.world_size, groups))) for first in range(groups)
        ]
    group = _MADE[me.world_size, groups][me.rank % groups]
    return replace(me, rank=me.rank // groups, world_size=me.world_size // groups, group=group)


class Refused(Exception):
    """The implementation refuses the case, as the contract allows."""


def enter(me: Rank, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    """Call `function`, which is judged, and put back what it sets for the whole process.

    Raises:
        Refused: it raised one of the contract's exceptions, by a `raise` of its own and not out of a collective; or it
            was given tensors that do not lie row behind row, which no contract over ranks promises to take.
    """
    try:
        with kept_defaults():
            return blame.hand_over(function, *arguments, **keywords)
    except (*REJECTIONS, RuntimeError) as error:
        if _wants_rows_behind_rows(error, (*arguments, *keywords.values())):
            raise Refused(f"{type(error).__name__}: {error}") from error
        if not isinstance(error, REJECTIONS):
            raise
        if me.recorder.failed is not None or blame.is_judges(error) or not blame.own_refusal(error):
            raise
        raise Refused(f"{type(error).__name__}: {error}") from error


def _wants_rows_behind_rows(error: BaseException, given: Sequence[Any]) -> bool:
    """Whether torch's own words refuse the strides of what was given, as collectives and views do."""
    laid_out = any(isinstance(tensor, Tensor) and not tensor.is_contiguous() for tensor in given)
    return laid_out and "contiguous" in str(error) and not blame.is_judges(error)


def digest(result: Tensor) -> str:
    """A name of the values of a result: equal results, whatever their dtype and layout, have the same one."""
    values = result.detach().cpu().double().nan_to_num(nan=1e300) + 0.0  # one zero, one NaN
    return sha1(values.contiguous().numpy().tobytes()).hexdigest()


def same_bits(one: Any, other: Any) -> bool:
    """Whether two tensors of one shape and dtype have the same bits; what is no dense tensor always has."""
    if not isinstance(one, Tensor) or one.layout is not torch.strided:
        return True
    # A fresh copy: memory may lie in any way, and a dimension of size 1 may have any stride.
    held = [t.detach().cpu().clone(memory_format=torch.contiguous_format).flatten() for t in (one, other)]
    return torch.equal(held[0].view(torch.uint8), held[1].view(torch.uint8))


def differing_rows(got: Tensor, expected: Tensor) -> Tensor:
    """Indices of the rows that differ anywhere; NaN equals NaN, which is right only where it is expected."""
    same = (got == expected) | (got.isnan() & expected.isnan())
    return (~same).any(1).nonzero().flatten()


def wrong_rows(out: Any, expected: Tensor, dtype: torch.dtype, report: RankReport) -> Tensor:
    """Indices of the rows of a result that differ from `expected`, fp64 [T, H]; `report` keeps the result's digest.

    A result that is no tensor of this shape and `dtype` is a finding of `report` and has no rows.
    """
    if not isinstance(out, Tensor) or out.shape != expected.shape or out.dtype != dtype:
        found = f"{out.dtype} {list(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
        report.fail("contract", f"the result is {found}, but should be {dtype} {list(expected.shape)}")
        return torch.zeros(0, dtype=torch.int64)
    got = out.cpu().double()
    report.observed["digest"] = digest(got)
    return differing_rows(got, expected)
