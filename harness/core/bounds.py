r"""The one home of bounds: unit roundoffs, ulps, and the variance of rounding errors carried through each stage.

A result is judged by z = (out - value) / sigma, elementwise: value in fp64, sigma^2 the variance that rounding at the
permitted places gives.  Rounding x to a dtype has variance ulp(x)^2 / 12; a sum of n products in an accumulator of unit
roundoff u has variance (1 + n/4) u^2 sum (w x)^2, which a sequential sum in random order stays under (its partial sums
grow as sqrt(n), so n/6 is what it needs).  A rounding that truncates (tf32 on tensor cores) has a mean besides, which
is carried through as a mean: `Bound.drift`.

Rounding errors are bounded and independent, hence strictly sub-Gaussian: P(|z| > t) <= 2 exp(-t^2 / 2).  Both limits
below follow from that and from the false alarms wanted, FALSE_ALARMS in a whole run; there is no other tolerance.
"""

from dataclasses import dataclass, replace
from functools import cache
from math import log, sqrt
from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core.contracts import ROUNDINGS

Rounds = frozenset[str]  # roundings that a result may hold
Declared = tuple[str, ...] | None  # those an implementation declares; None: all of them

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ACCUMULATOR = 2.0**-24  # unit roundoff of fp32, the least the contract allows
TF32 = 2.0**-10  # distance between neighbours of tf32 at 1
TF32_DROPPED = 0x1FFF  # bits of an fp32 number that tf32 has not
FALSE_ALARMS = 1e-9
EXACT_FIT = 2.0**-20  # of the largest value: what a least-squares fit of exact data may leave
NARROWED = 2.0**-3  # of the largest value: more than any format of two or more mantissa bits rounds by
SAME_IN_FP64 = 2.0**-20  # sigmas between two orders of one sum in fp64; fp64 rounds 2^29 times finer than any sigma
ELEMENTS_PER_RUN = 1e8  # a quick run judges about 2e6 elements, a full one 5e7
MODEL = 1.05  # how far sigma itself is trusted; right implementations with every permitted rounding measure up to 1.01
STATISTICS_PER_RUN = 1e6  # rows, columns, experts and tiles
DRAWS_PER_RUN = 10  # means of log p over the draws of a model; a run has one, or one for each family
SAME_DRAWS = 0.5  # of the rows, that one seed has to draw again: on a GPU a draw near a boundary may change
FLUSHED = 2.0**-126  # a number of fp32 below may be flushed to zero; experts whose scores lie there are tied
STORED = 0.501  # ulps that a store in the dtype of the result may add to a limit, not to a variance
UNTOUCHED = 1e-300  # variance of what must keep its bits: any other value is further off than every limit
NEAR_TOP_P = 1e-3  # how near a sum of probabilities may come to top_p before either side of it is right


EXPONENT_BITS = 0x7FF0_0000_0000_0000  # of fp64


def binade(x: Tensor, dtype: torch.dtype) -> Tensor:
    """2^floor(log2 |x|) in fp64, never under the smallest normal number of `dtype`.

    Below that a device may flush to zero, so ulps do not shrink further.  Cutting the mantissa's bits off is exact and
    five times faster than frexp and ldexp, which took a third of the time of a bound.
    """
    floor = x.double().abs().clamp(min=torch.finfo(dtype).smallest_normal)
    return (floor.view(torch.int64) & EXPONENT_BITS).view(torch.float64)


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance between neighbours of `dtype` at |x|, in fp64."""
    return binade(x, dtype).mul_(torch.finfo(dtype).eps)


def store(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Variance of rounding x to `dtype`."""
    info = torch.finfo(dtype)
    variance = binade(x, dtype).square_().mul_(info.eps**2 / 12)
    if dtype != torch.float16:  # every device handles fp16's subnormals
        variance.add_(info.smallest_normal**2)  # flushed to zero instead of stored as a subnormal
    return variance


def rounded_once(x: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    """Largest error of x, rounded to `dtype` once: before it was multiplied by `scale`, or after."""
    info = torch.finfo(dtype)
    return (x.abs() + info.smallest_normal * max(1.0, scale)) * (info.eps / 2)


def accumulation(terms: int) -> float:
    """Variance factor of an fp32 sum of `terms` products, relative to the sum of their squares."""
    return (1 + terms / 4) * ACCUMULATOR**2


def in_tf32(rounds: Rounds, dtype: torch.dtype) -> bool:
    """Whether products of this dtype may read their operands as tf32."""
    return "tf32" in rounds and dtype == torch.float32


def cut(x: Tensor) -> Tensor:
    """fp64 values of the fp32 numbers `x`, cut toward zero to tf32, as Hopper's tensor cores read them."""
    return (x.float().view(torch.int32) & ~TF32_DROPPED).view(torch.float32).double()


def grid(x: Tensor) -> Tensor:
    """Variance of rounding x to tf32, to nearest: what a cut adds beside its drift."""
    return binade(x, torch.float32).square_().mul_(TF32**2 / 12)


def product_variance(rows: Tensor, weight: Tensor, rounds: Rounds, dtype: torch.dtype) -> Tensor:
    """Variance of rows @ weight.T, [rows, N], for operands [rows, K] and [N, K] in fp64."""
    squares, of_weight = rows.square(), weight.square()
    variance = squares @ of_weight.T * accumulation(rows.shape[-1])
    if in_tf32(rounds, dtype):
        variance += grid(rows) @ of_weight.T + squares @ grid(weight).T
    return variance


def permitted(declared: Declared) -> Rounds:
    """The set of roundings a result may hold: what is declared, or all of them."""
    return frozenset(ROUNDINGS if declared is None else declared)


@dataclass(frozen=True)
class Bound:
    """What a result may be: fp64 value and variance, both of the output's shape.

    `shared` is the part of the variance whose sources scale a whole row alike (the rounding of a routing weight).
    `sources` [rows, 2] is how many independent sources the elements of a row have in common: of the rest (inf where
    each element has its own), and of the shared part.  Both bound the degrees of freedom of rms statistics.

    `drift` [2, *shape], lowest and highest: where between them the mean of a result lies is the implementation's
    choice, and no error.  Operands cut toward zero shrink every product; three products in a row move a result by
    their sum, since the shrinks have one sign, and that is up to ten of the sigmas which rounding them gives.
    """

    value: Tensor
    variance: Tensor
    shared: Tensor
    sources: Tensor
    drift: Tensor | None = None

    def error(self, output: Tensor) -> Tensor:
        """output - value in fp64, less what the drift allows; where both are infinite of one sign, 0."""
        error = output.double() - self.value
        error = torch.where(output.double() == self.value, torch.zeros_like(error), error)
        return error if self.drift is None else error - error.clamp(*self.drift)

    def z(self, output: Tensor) -> Tensor:
        """`error` in sigmas."""
        return self.error(output) / self.variance.sqrt()

    def flat(self) -> "Bound":
        """Leading dimensions flattened, a vector as one row."""
        width = self.value.shape[-1]
        value, variance, shared = (t.detach().reshape(-1, width) for t in (self.value, self.variance, self.shared))
        drift = None if self.drift is None else self.drift.reshape(2, -1, width)
        return Bound(value, variance, shared, self.sources, drift)

    def part(self, rows: Tensor) -> "Bound":
        """That of these rows (int64 row numbers), flat."""
        whole = self.flat()
        drift = None if whole.drift is None else whole.drift[:, rows]
        return Bound(whole.value[rows], whole.variance[rows], whole.shared[rows], whole.sources[rows], drift)

    def open_where(self, rows: Tensor) -> "Bound":
        """As it is, but without a limit in these rows [rows], bool.  Raises ValueError without a drift."""
        if self.drift is None:
            raise ValueError("only a bound with a drift can be opened")
        ends = torch.tensor([-torch.inf, torch.inf], dtype=torch.float64, device=rows.device)
        return replace(self, drift=torch.where(rows[:, None], ends[:, None, None], self.drift))


def drift_to(value: Tensor, extreme: Tensor) -> Tensor:
    """Drift of a result whose mean lies between `value` and `extreme`; none where one of them is not finite."""
    moved = (extreme - value).nan_to_num(0.0, 0.0, 0.0)
    return torch.stack([moved.clamp(max=0), moved.clamp(min=0)])


def finish(value: Tensor, variance: Tensor, dtype: torch.dtype) -> Tensor:
    """Add the store of the output: at the edge of a binade the result may fall on the side of the larger ulp."""
    return variance + store(value.abs() + variance.sqrt(), dtype)


@cache
def max_limit(elements: float = ELEMENTS_PER_RUN) -> float:
    """Limit of |z| for every element of a run."""
    return sqrt(2 * log(2 * elements / FALSE_ALARMS))


@cache
def _mean_square_quantile(dof: int) -> float:
    from scipy.special import chdtri

    return float(chdtri(dof, FALSE_ALARMS / STATISTICS_PER_RUN / 2)) / dof


@cache
def student_limit(dof: int) -> float:
    """Limit of |t|, a mean over its own error, of `dof` degrees of freedom; 7.8 for 63."""
    from scipy.special import stdtrit

    return float(-stdtrit(dof, FALSE_ALARMS / DRAWS_PER_RUN / 2))


def rms_limit(dof: float, shared_dof: float = 1, shared_share: float = 0.0) -> float:
    """Limit of an rms of z with `dof` independent sources, `shared_share` of its variance having only `shared_dof`."""
    own = (1 - shared_share) * _mean_square_quantile(_rounded_down(dof))
    return MODEL * sqrt(
        own + (shared_share * _mean_square_quantile(_rounded_down(shared_dof)) if shared_share > 0 else 0.0)
    )


def independent(sources: Tensor, width: int | Tensor) -> Tensor:
    """Degrees of freedom of the mean square of `width` elements whose errors are mixed from so many common sources.

    Two such elements correlate by about 1 / sqrt(sources) with a random sign, so the variance of their mean square is
    2 / width + 2 / sources.
    """
    return 1 / (1 / width + 1 / sources)


def sources_of(variance: Tensor, shared: Tensor, concentrated: Tensor) -> Tensor:
    """How many sources of equal size would concentrate the variance of a row [T, H] as its own do, float64 [T].

    concentrated [T] is the sum over the sources of the square of the variance that each adds to an element on average.
    Hidden values are of very unequal size: of 384 one may hold 40 % of the variance of a token's output.
    """
    found = (variance - shared).mean(-1).square() / concentrated
    return found.clamp(min=1).nan_to_num(nan=torch.inf, posinf=torch.inf)


def _count(rows: Tensor) -> Tensor:
    """How many values of equal size would be as concentrated as those of a row, [rows]; a cut of each is a source."""
    squares = rows.square()
    return (squares.sum(-1).square() / squares.square().sum(-1)).clamp(min=1).nan_to_num(nan=1.0)


def _rounded_down(dof: float) -> int:
    """A power of sqrt(2) below, so that few quantiles are computed; fewer degrees of freedom are the safe side."""
    exact = max(1, int(dof))
    return exact if exact < 8 else int(2 ** (int(2 * log(exact, 2)) / 2))


def matrix(tensor: Tensor) -> Tensor:
    """Leading dimensions flattened, a vector as one row; apart from any graph."""
    return tensor.detach().reshape(-1, tensor.shape[-1])


def of_result(result: Any, rows: Tensor) -> Any:
    """These rows of what an implementation returned, a tensor or a tuple of them."""
    return tuple(matrix(r)[rows] for r in result) if isinstance(result, tuple) else matrix(result)[rows]


def truth_of(truth: Any, rows: Tensor) -> Any:
    """These rows of what is right, one truth or a tuple of them; None where it is not known."""
    if isinstance(truth, tuple):
        return tuple(truth_of(one, rows) for one in truth)
    if isinstance(truth, Bound):
        return truth.part(rows)
    return None if truth is None else matrix(truth)[rows]
