"""How far a count of draws may be from its mean, with the false alarms of core/bounds."""

from math import log, log10, sqrt

import torch
from torch import Tensor

from moe_harness.harness.core.bounds import FALSE_ALARMS, STATISTICS_PER_RUN


def statistic_limit() -> float:
    """Least probability of a count for which a right implementation is not to blame."""
    return FALSE_ALARMS / STATISTICS_PER_RUN


def count_headroom(count: int, draws: int, probability: float) -> float:
    """How far a count is in the tail of its binomial distribution, as a share of the limit: above 1 it fails."""
    return float(count_headrooms(torch.tensor([count]), draws, torch.tensor([probability], dtype=torch.float64)))


def count_headrooms(counts: Tensor, draws: int, probabilities: Tensor) -> Tensor:
    """As `count_headroom` of many counts, each with its probability: one call of scipy costs as much as for one.

    Of scipy.special, which every process has: scipy.stats takes each of them two seconds to import.
    """
    from scipy.special import bdtr, bdtrc

    count, p = counts.double().numpy(), probabilities.double().clamp(max=1.0).numpy()
    above = count > draws * p
    tail = torch.empty(len(count), dtype=torch.float64)
    tail[above] = torch.from_numpy(bdtrc(count[above] - 1, draws, p[above]))
    tail[~above] = torch.from_numpy(bdtr(count[~above], draws, p[~above]))
    used = (-(tail.log() + log(2)) / log(10)).clamp(min=0.0) / -log10(statistic_limit())
    return torch.where(probabilities > 0, used, torch.where(counts > 0, torch.inf, 0.0))


def spread_headroom(counts: Tensor, draws: int, probabilities: Tensor) -> float:
    """As `count_headroom` for all tokens at once: Pearson's statistic over cells that expect at least 20 draws.

    At 20 the tail of a cell is heavier than a Gaussian's; the statistic is corrected by its known excess of variance,
    so that the limit stays on the safe side.
    """
    from scipy.special import chdtrc

    expected = probabilities * draws
    kept = expected >= 20
    cells = int(kept.sum())
    if cells < 2:
        return 0.0
    statistic = float(((counts - expected).square() / expected)[kept].sum())
    excess = sqrt(1 + float((1 / expected[kept]).sum()) / (2 * cells))
    tail = torch.tensor(chdtrc(cells, cells + (statistic - cells) / excess)).log()
    return max(0.0, float(-tail) / log(10)) / -log10(statistic_limit())
