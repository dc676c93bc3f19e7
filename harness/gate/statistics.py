r"""The statistics of a paired comparison of N questions: b only the baseline answers, c only the candidate.

    drop = (b - c) / N            worse: exact one-sided McNemar, P(X >= b), X ~ Bin(b + c, 1/2)
    interval: Tango's score interval (Statistics in Medicine 17, 1998), the drops d0 with |z(d0)| <= z,
        z(d0) = (b - c - N d0) / sqrt(N (2 q + d0 (1 - d0))),
    q the likeliest share of questions that only the candidate answers, given that drop:
        2 N q^2 - [b + c - (2 N - b + c) d0] q - c d0 (1 - d0) = 0

It needs no discordant pair to be sensible: with b = c = 0 its upper end is z^2 / (N + z^2).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import optimize, special, stats

LEVEL = (
    0.05  # of the one-sided tests; the interval has twice that outside, so that its upper end is the one-sided limit
)
MOST = 10_000_000


@dataclass(frozen=True)
class Paired:
    """Counts of one comparison."""

    documents: int
    worse: int  # only the baseline was right
    better: int  # only the candidate was right

    @property
    def drop(self) -> float:
        return (self.worse - self.better) / self.documents

    @property
    def p(self) -> float:
        """Exact one-sided McNemar: how likely so many losses are where nothing was lost."""
        return mcnemar(self.worse, self.better)

    @property
    def interval(self) -> tuple[float, float]:
        return tango(self.worse, self.better, self.documents)


def mcnemar(worse: int, better: int) -> float:
    """P(X >= worse) with X ~ Bin(worse + better, 1/2); 1 where no pair differs."""
    return float(stats.binom.sf(worse - 1, worse + better, 0.5)) if worse + better else 1.0


def tango(worse: float, better: float, documents: float, level: float = LEVEL) -> tuple[float, float]:
    """The score interval of the drop; `level` lies outside at either end."""
    z = float(stats.norm.isf(level))
    drop = (worse - better) / documents

    def end(sign: float, limit: float) -> float:
        def excess(d0: float) -> float:
            return sign * _score(worse, better, documents, d0) + z

        if excess(limit) > 0:
            return limit
        return float(optimize.brentq(excess, drop, limit, xtol=1e-10))

    return end(-1, -1 + 1e-12), end(1, 1 - 1e-12)


def _score(worse: float, better: float, documents: float, d0: float) -> float:
    """Tango's statistic for a drop of `d0`: how far the observed drop lies above it, in standard errors."""
    # q: the share of questions that only the candidate answers, most likely where the drop is d0.
    a = 2 * documents
    b = -worse - better + (2 * documents - worse + better) * d0
    c = -better * d0 * (1 - d0)
    q = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
    variance = documents * (2 * q + d0 * (1 - d0))
    distance = worse - better - documents * d0
    if variance <= 0:
        return 0.0 if distance == 0 else math.copysign(math.inf, distance)
    return distance / math.sqrt(variance)


def verdict(found: Paired, margin: float) -> str:
    """pass: the drop is below `margin`; fail: there is one; inconclusive: neither is shown."""
    if found.interval[1] < margin:
        return "pass"
    return "fail" if found.p < LEVEL else "inconclusive"


def needed(found: Paired, margin: float) -> int | None:
    """How many questions would decide at the rates seen here; None where more than MOST would be needed."""

    def decided(documents: float) -> bool:
        scale = documents / found.documents
        worse, better = found.worse * scale, found.better * scale
        if tango(worse, better, documents)[1] < margin:
            return True
        return worse + better > 0 and _sure(worse, better)

    if decided(found.documents):
        return found.documents
    low, high = found.documents, 2 * found.documents
    while not decided(high):
        low, high = high, 2 * high
        if high > MOST:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if decided(middle) else (middle, high)
    return high


def _sure(worse: float, better: float) -> bool:
    """McNemar's test for counts that need not be whole: the binomial tail as an incomplete beta function."""
    return float(special.betainc(worse, better + 1, 0.5)) < LEVEL if worse else False


@dataclass(frozen=True)
class Shift:
    """The mean of paired differences, with the interval that holds it at twice LEVEL outside.

    `p`: Wilcoxon's one-sided signed-rank test that they lie below zero.  A few questions that suffer much widen the
    interval, so that it holds zero where nearly all differences are below it.
    """

    mean: float
    interval: tuple[float, float]
    largest: float
    p: float

    @classmethod
    def of(cls, differences: Sequence[float]) -> "Shift | None":
        """None where there is nothing to average."""
        if not differences:
            return None
        n, mean = len(differences), math.fsum(differences) / len(differences)
        largest = max(abs(x) for x in differences)
        p = float(stats.wilcoxon(differences, alternative="less").pvalue) if largest else 1.0
        if n == 1:
            return cls(mean, (-math.inf, math.inf), largest, p)
        deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in differences) / (n - 1) / n)
        reach = float(stats.t.isf(LEVEL, n - 1)) * deviation
        return cls(mean, (mean - reach, mean + reach), largest, p)
