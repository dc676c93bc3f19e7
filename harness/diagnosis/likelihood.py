r"""How near a candidate's output is to the one that was got, in sigma, beside how near the right answer is.

    z = (got - candidate) / sigma,   sigma^2 = what the permitted roundings give around the candidate
                                             + the candidate's own last rounding

The permitted variance is known around the right value only.  A fault that makes a row larger makes its roundings
larger in the same proportion, so the variance of a row is at least (typical variance / value^2) times its mean square.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import reduce
from math import inf, isfinite, log, sqrt
from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core import bounds
from moe_harness.harness.core.bounds import Bound, matrix
from moe_harness.harness.core.call import Call
from moe_harness.harness.core.stage import Stage, Truth

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
    """What one output of a right result may be."""

    def __init__(self, bound: Bound, dtype: torch.dtype):
        self.dtype = dtype
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
        """Typical variance of an element over its mean square, from rows that are not all zero.

        Of memory that is written in part, from what is written: where a fault writes, its values are rounded too.
        """
        size = self.value.nan_to_num(0.0, 0.0, 0.0).square().mean(1)
        written = self.variance.amax(1) > bounds.UNTOUCHED if self.variance.numel() else size > 0
        size = torch.where(written, size, 0.0) if bool((written & (size > 0)).any()) else size
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
        off, right_off = z_of(candidate, got, sigma), z_of(self.value, got, sigma)
        sources = {"own": self.own, "common": self.common, "shared": self.shared}
        return fit_of(off, right_off, z_of(self.value, candidate, sigma), elements=got.numel(), **sources)

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


class Several:
    """A right result of several tensors, each a `Values`; operands that are written in place among them."""

    def __init__(self, parts: Sequence[Values]):
        self.parts = parts
        self.right = tuple(part.right for part in parts)
        for part in parts:  # where a fault writes one into the other, it has the roundings of either
            part.relative = max(other.relative for other in parts)

    def focus(self, got: tuple[Tensor, ...]) -> None:
        """As `Values.focus`, of each."""
        for part, one in zip(self.parts, got, strict=True):
            part.focus(one)

    def fit(self, candidate: tuple, got: tuple, others: tuple[tuple, ...] = ()) -> Fit:
        """As `Values.fit`, of all together."""
        fits = (
            part.fit(candidate[place], got[place], tuple(other[place] for other in others))
            for place, part in enumerate(self.parts)
        )
        return reduce(Fit.plus, fits)


class Undiagnosable(Exception):
    """A stage whose results this module cannot compare with those of faults."""


def likelihood_of(stage: Stage, call: Call) -> Any:
    """What a right result of the call may be: a `Values`, or the `Likelihood` of the stage's own `likelihood.py`.

    Raises:
        Undiagnosable: the stage has several outputs, and no module of that name.
    """
    module = stage.part("likelihood")
    if module is not None:
        return module.Likelihood(stage, call)
    outputs = stage.outputs(call)
    if not all(dtype.is_floating_point for output in outputs for dtype in output.dtypes):
        raise Undiagnosable(f"{stage.name} returns integers and has no likelihood.py")
    found = call.truth if _permits_all(call) else stage.expect(call, None)
    truths = found if isinstance(found, tuple) else (found,)
    parts = [Values(_bound(of), output.dtypes[0]) for of, output in zip(truths, outputs, strict=True)]
    return parts[0] if len(parts) == 1 else Several(parts)


def _permits_all(call: Call) -> bool:
    """Whether what the judge takes for right, where that is known, is what every permitted rounding may give."""
    known = call.truth if isinstance(call.truth, tuple) else (call.truth,)
    nothing_declared = call.declared is not None and call.declared.rounds is None
    return nothing_declared and any(isinstance(of, Bound) for of in known)  # without a bound one value alone is right


def _bound(truth: Truth) -> Bound:
    """Of what has one right value as well, of which no rounding changes anything."""
    if isinstance(truth, Bound):
        return truth
    none = torch.zeros_like(truth, dtype=torch.float64)
    sources = none.new_full((len(matrix(none)), 2), inf)
    return Bound(truth.double(), none, none, sources)


def fit_of(off: Distance, right_off: Distance, difference: Distance, **sources: float) -> Fit:
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


def z_of(value: Tensor, got: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """((got - value) / sigma where both are finite, where one is NaN or infinite and the other is something else)."""
    same = (value == got) | (value.isnan() & got.isnan())
    comparable = value.isfinite() & got.isfinite()
    z = torch.where(comparable & ~same, (got - value) / sigma, 0.0)
    return z, ~comparable & ~same
