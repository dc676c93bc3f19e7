r"""How near a candidate's output is to the one that was got, in sigma, beside how near the right answer is.

    z = (got - candidate) / sigma,   sigma^2 = what the permitted roundings give around the candidate
                                             + the candidate's own last rounding

The permitted variance is known around the right value only.  A fault that makes a row larger makes its roundings
larger in the same proportion, so the variance of a row is at least (typical variance / value^2) times its mean square.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import inf, isfinite, log, sqrt
from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core import bounds
from moe_harness.harness.core.call import Call
from moe_harness.harness.core.rows import matrix

Distance = tuple[Tensor, Tensor]  # z of elements; where one is NaN or infinite and the other is something else
LARGE = 1 << 15  # elements beyond which a part of the rows is looked at
FURTHEST = 512
SHOWN = 3.0  # sigmas by which a candidate shows that it is not right: its roundings alone reach 1 in 3 % of elements


@dataclass
class Fit:
    """One candidate against one result, or the sum over several (`plus`); z with the candidate's sigma throughout."""

    elements: int = 0
    mismatched: int = 0  # elements where one of both is NaN or infinite and the other is not
    squares: float = 0.0
    largest: float = 0.0
    right_squares: float = 0.0
    right_largest: float = 0.0
    shown: int = 0  # elements in which the candidate differs from the right answer
    shown_squares: float = 0.0
    own: float = 0.0  # independent sources of rounding behind the elements, and those common to a row
    common: float = 0.0
    shared: float = 0.0  # share of the variance whose sources are common, times the elements

    def plus(self, other: "Fit") -> "Fit":
        summed = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        highest = {n: max(getattr(self, n), getattr(other, n)) for n in ("largest", "right_largest")}
        return Fit(**summed | highest)

    @property
    def rms(self) -> float:
        return sqrt(self.squares / self.elements) if self.elements else 0.0

    @property
    def right_rms(self) -> float:
        return sqrt(self.right_squares / self.elements) if self.elements else 0.0

    def equal(self) -> bool:
        """Whether candidate and result differ by no more than rounding."""
        if self.mismatched or self.largest > bounds.max_limit():
            return False
        if not self.elements:
            return True
        share = min(1.0, self.shared / self.elements)
        part = self.shown / self.elements
        where_shown = sqrt(self.shown_squares / self.shown) if self.shown else 0.0
        return self.rms <= bounds.rms_limit(
            max(1.0, self.own), max(1.0, self.common), share
        ) and where_shown <= bounds.rms_limit(max(1.0, self.own * part), max(1.0, self.common * part), share)

    def gain(self) -> float:
        """Twice the log likelihood of the candidate over that of the right answer, counting independent sources."""
        if self.mismatched:
            return -inf
        if not isfinite(self.right_squares):
            return inf
        independent = min(1.0, self.own / self.elements) if self.elements else 0.0
        return (self.right_squares - self.squares) * independent

    def explains(self, candidates: int) -> bool:
        """Equal, and the right answer is not: one of `candidates` gains that much by chance in FALSE_ALARMS of runs."""
        return self.equal() and self.gain() > 2 * log(candidates / bounds.FALSE_ALARMS)


class Values:
    """A right result of a stage that returns one tensor."""

    def __init__(self, stage: Any, call: Call):
        self.dtype = stage.outputs(call)[0][2]
        bound = stage.expect(call, None)
        self.value = matrix(bound.value)
        finite = self.value.isfinite()
        self.variance = torch.where(finite, matrix(bound.variance), 0.0).nan_to_num(0.0, 0.0, 0.0)
        share = (matrix(bound.shared) / self.variance).nan_to_num(0.0, 0.0, 0.0).clamp(0, 1)
        self.shared = float(share.sum())
        sources = bound.sources.clamp(min=1)
        self.own = float(bounds.independent(sources[:, 0], max(1, self.value.shape[-1])).sum())
        self.common = float(sources[:, 1].sum())
        self.relative = self._relative()
        self.right = bound.value
        self.rows: Tensor | None = None

    def focus(self, got: Tensor) -> None:
        """From now on look at some rows of a large result only: those furthest from the right value, and others."""
        if self.value.numel() <= LARGE or self.value.shape[0] <= 2 * FURTHEST:
            return
        error = (matrix(got).double() - self.value).abs().nan_to_num(inf, inf, inf).amax(1)
        spread = torch.linspace(0, len(error) - 1, FURTHEST, device=error.device).long()
        self.rows = torch.cat([error.topk(FURTHEST).indices, spread]).unique()
        part = len(self.rows) / len(error)
        self.value, self.variance = self.value[self.rows], self.variance[self.rows]
        self.own, self.common, self.shared = self.own * part, self.common * part, self.shared * part

    def _relative(self) -> float:
        """Typical variance of an element over its mean square, from rows that are not all zero."""
        size = self.value.nan_to_num(0.0, 0.0, 0.0).square().mean(1)
        if not bool((size > 0).any()):
            return len(bounds.ROUNDINGS) * torch.finfo(self.dtype).eps ** 2 / 12
        return float((self.variance.mean(1)[size > 0] / size[size > 0]).median())

    def fit(self, candidate: Tensor, got: Tensor, others: tuple[Tensor, ...] = ()) -> Fit:
        """`others` are outputs of the candidate on inputs changed by a few roundings: how far it wavers by itself."""
        candidate, got = self._focused(candidate), self._focused(got)
        others = tuple(self._focused(other) for other in others)
        if not got.numel():
            return Fit()
        sigma = self._variance(candidate, others).sqrt()
        off, right_off = _z(candidate, got, sigma), _z(self.value, got, sigma)
        sources = {"own": self.own, "common": self.common, "shared": self.shared}
        return _fit(off, right_off, _z(self.value, candidate, sigma), elements=got.numel(), **sources)

    def _focused(self, result: Tensor) -> Tensor:
        rows = matrix(result)
        return (rows if self.rows is None or len(rows) == len(self.rows) else rows[self.rows]).double()

    def _variance(self, candidate: Tensor, others: Sequence[Tensor]) -> Tensor:
        plain = candidate.nan_to_num(0.0, 0.0, 0.0)
        of_row = self.relative * plain.square().mean(1, keepdim=True)
        variance = torch.maximum(self.variance, of_row) + bounds.store(plain, self.dtype)
        for other in others:
            variance = torch.maximum(variance, variance + (other - plain).square().nan_to_num(0, 0, 0))
        return variance


class Routing:
    """A right result of the stage router: weights laid out by expert, so that the order of the slots says nothing."""

    def __init__(self, stage: Any, call: Call):
        self.truth = stage.Selection(call)
        self.logits, self.keywords = call.args["router_logits"], call.keywords
        self.experts = self.logits.shape[-1]
        score = bounds.score_error(self.logits, self.keywords["scoring"]).amax(-1, keepdim=True)
        self.relative = 2 * (score + (self.keywords["top_k"] + 4) * bounds.ACCUMULATOR)
        self.right = stage.reference.router(self.logits.double(), **_in_fp64(self.keywords))

    def fit(self, candidate: Any, got: Any, others: tuple[Any, ...] = ()) -> Fit:
        """As `Values.fit`; a worst-case bound takes the place of the largest sigma that the limit allows."""
        if not got[1].numel():
            return Fit()
        one, two = self._laid_out(candidate), self._laid_out(got)
        sigma, unsettled = self._sigma(one, two, candidate, got), self._unsettled(one, others)
        for other in others:
            sigma = sigma + (self._laid_out(other)[0] - one[0]).abs().nan_to_num(0.0, 0.0, 0.0)
        z, mismatch = self._distance(one, two, sigma)
        z, mismatch = z.masked_fill(unsettled, 0.0), mismatch & ~unsettled
        truth, count = self._laid_out(self.right), got[1].numel()
        right_off, difference = self._distance(truth, two, sigma), self._distance(truth, one, sigma)
        return _fit((z, mismatch), right_off, difference, elements=count, own=count, common=1.0)

    def _laid_out(self, result: Any) -> tuple[Tensor, Tensor]:
        """(weights, counts) [T, E + 1]; ids out of range meet in the last column.

        In rows holding NaN any distinct ids are right: there only the number of ids that are not is kept.
        """
        weights, ids = result[0].detach().double(), result[1].detach().long()
        column = torch.where((ids < 0) | (ids >= self.experts), self.experts, ids)
        laid = weights.new_zeros(len(ids), self.experts + 1).scatter_add(1, column, weights)
        count = weights.new_zeros(len(ids), self.experts + 1).scatter_add(1, column, torch.ones_like(weights))
        unspecified = ~self.truth.defined[:, None]
        bad = count[:, -1:] + (count[:, :-1] - 1).clamp(min=0).sum(1, keepdim=True)
        only = torch.zeros_like(count)
        only[:, -1:] = bad
        return torch.where(unspecified, 0.0, laid), torch.where(unspecified, only, count)

    def _sigma(self, one: tuple, two: tuple, candidate: Any, got: Any) -> Tensor:
        size = torch.maximum(one[0].abs(), two[0].abs()).nan_to_num(0.0, 0.0, 0.0)
        coarser = max((candidate[0].dtype, got[0].dtype), key=lambda dtype: torch.finfo(dtype).eps)
        limit = self.relative.nan_to_num(0.0, 0.0, 0.0) * size + bounds.ulp(size, coarser) * 0.501 + 2.0**-126
        return limit / bounds.max_limit()

    def _distance(self, one: tuple, two: tuple, sigma: Tensor) -> tuple[Tensor, Tensor]:
        z, mismatch = _z(one[0], two[0], sigma)
        other = (one[1] != two[1]).any(1, keepdim=True)
        tied = other & self._tied(one[1], two[1])
        sets = (one[1] != two[1]) & ~tied
        return z.masked_fill(tied, 0.0), (mismatch & ~tied) | sets

    def _tied(self, one: Tensor, two: Tensor) -> Tensor:
        """Rows in which both chose other experts of equal selection scores, [T, 1]."""
        selection, slack = self.truth.selection, self.truth.slack
        changed = (one - two)[:, :-1]
        balance = (changed * selection.nan_to_num(0.0, 0.0, 0.0)).sum(1, keepdim=True).abs()
        room = 2 * (changed.abs() * slack.nan_to_num(0.0, 0.0, 0.0)).sum(1, keepdim=True)
        spread = torch.where(changed != 0, selection, torch.nan).nan_to_num(0.0)
        high = torch.where(changed != 0, selection, -inf).amax(1, keepdim=True)
        low = torch.where(changed != 0, selection, inf).amin(1, keepdim=True)
        distinct = (two[:, :-1] <= 1).all(1, keepdim=True) & (one[:, :-1] <= 1).all(1, keepdim=True)
        inside = (one[:, -1:] == 0) & (two[:, -1:] == 0) & spread.isfinite().all(1, keepdim=True)
        return distinct & inside & (balance <= room) & (high - low <= room)

    def _unsettled(self, one: tuple, others: tuple[Any, ...]) -> Tensor:
        """Rows in which the candidate itself chooses other experts after a few roundings."""
        changed = torch.zeros(len(one[1]), 1, dtype=torch.bool, device=one[1].device)
        for other in others:
            changed |= (self._laid_out(other)[1] != one[1]).any(1, keepdim=True)
        return changed


def truth_of(stage: Any, call: Call) -> Values | Routing:
    """What a right result of the call may be."""
    return Routing(stage, call) if hasattr(stage, "Selection") else Values(stage, call)


def _fit(off: Distance, right_off: Distance, difference: Distance, **sources: float) -> Fit:
    """From (z, mismatch) of the result around the candidate and around the right value, and of both candidates."""
    (z, mismatch), (right, right_mismatch) = off, right_off
    shown = (difference[0].abs() > SHOWN) | difference[1]
    beyond = bool(right_mismatch.any())
    return Fit(
        mismatched=int(mismatch.sum()),
        squares=float(z.square().sum()),
        largest=float(z.abs().max()),
        shown=int(shown.sum()),
        shown_squares=float(z[shown].square().sum()),
        right_squares=inf if beyond else float(right.square().sum()),
        right_largest=inf if beyond else float(right.abs().max()),
        **sources,  # type: ignore[arg-type]  # elements, own, common, shared
    )


def _z(value: Tensor, got: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """((got - value) / sigma where both are finite, where one is NaN or infinite and the other is something else)."""
    same = (value == got) | (value.isnan() & got.isnan())
    comparable = value.isfinite() & got.isfinite()
    z = torch.where(comparable & ~same, (got - value) / sigma, 0.0)
    return z, ~comparable & ~same


def _in_fp64(keywords: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() if isinstance(v, Tensor) else v for k, v in keywords.items()}
