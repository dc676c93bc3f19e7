"""How near a fault's choice of experts, and its weights, are to those that were got."""

from math import inf
from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core import bounds
from moe_harness.harness.core.call import Call
from moe_harness.harness.core.stage import Stage
from moe_harness.harness.diagnosis.likelihood import Fit, fit_of, z_of
from moe_harness.harness.stages.router.bound import score_error
from moe_harness.harness.stages.router.stage import Selection
from moe_harness.reference import router as reference

UNLIKE = 1e9  # sigma between a number and what is none


class Likelihood:
    """A right result: weights laid out by expert, so that the order of the slots says nothing."""

    def __init__(self, stage: Stage, call: Call):
        self.truth = Selection(call)
        self.logits, self.keywords = call.args["router_logits"], call.keywords
        self.experts = self.logits.shape[-1]
        score = score_error(self.logits, self.keywords["scoring"]).amax(-1, keepdim=True)
        self.relative = 2 * (score + (self.keywords["top_k"] + 4) * bounds.ACCUMULATOR)
        self.right = reference.router(self.logits.double(), **_in_fp64(self.keywords))

    def fit(self, candidate: Any, got: Any, others: tuple[Any, ...] = ()) -> Fit:
        """As `Values.fit`; a worst-case bound takes the place of the largest sigma that the limit allows."""
        if not got[1].numel():
            return Fit()
        one, two = self._laid_out(candidate), self._laid_out(got)
        sigma, unsettled = self._sigma(one, two, candidate, got), self._unsettled(one, others)
        silent = unsettled & ~self._same(two, (candidate, *others)).any(0)  # of no choice of its own: says nothing
        of_chosen = sigma
        for other in map(self._laid_out, others):
            moved = (other[0] - one[0]).abs().nan_to_num(0.0, 0.0, 0.0)
            sigma, of_chosen = sigma + moved, of_chosen + moved * (other[1] == one[1])
        z, mismatch = self._distance(one, two, sigma)
        z = torch.where(unsettled, self._from_the_same_choice(two, (candidate, *others), of_chosen), z)
        mismatch = mismatch & ~unsettled
        truth, count = self._laid_out(self.right), got[1].numel()
        difference, (off, sets) = self._distance(truth, one, sigma), self._distance(truth, two, sigma)
        right_off = off.masked_fill(silent, 0.0), sets & ~silent
        return fit_of((z, mismatch), right_off, difference, elements=count, own=count, common=1.0)

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
        stored = bounds.ulp(size, coarser) * bounds.STORED + bounds.FLUSHED
        limit = self.relative.nan_to_num(0.0, 0.0, 0.0) * size + stored
        return limit / bounds.max_limit()

    def _distance(self, one: tuple, two: tuple, sigma: Tensor) -> tuple[Tensor, Tensor]:
        z, mismatch = z_of(one[0], two[0], sigma)
        other = (one[1] != two[1]).any(1, keepdim=True)
        tied = other & self._tied(one[1], two[1])
        sets = (one[1] != two[1]) & ~tied
        return z.masked_fill(tied, 0.0), (mismatch & ~tied) | sets

    def _from_the_same_choice(self, got: tuple, versions: tuple[Any, ...], sigma: Tensor) -> Tensor:
        """Distance of the weights from the nearest version that chooses the experts that were got, 0 where none does.

        A candidate that chooses otherwise after a few roundings is not therefore equal to whatever weights were got.
        """
        z, found = torch.full_like(sigma, inf), torch.zeros(len(sigma), 1, dtype=torch.bool, device=sigma.device)
        for version in map(self._laid_out, versions):
            same = (version[1] == got[1]).all(1, keepdim=True)
            apart, mismatch = z_of(version[0], got[0], sigma)
            apart = apart.abs().masked_fill(mismatch, UNLIKE)
            z = torch.where(same & (apart.amax(1, keepdim=True) < z.amax(1, keepdim=True)), apart, z)
            found |= same
        return torch.where(found, z, 0.0)

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
        return ~self._same(one, others).all(0)

    def _same(self, one: tuple, others: tuple[Any, ...]) -> Tensor:
        """For each of `others` the rows whose experts are those of `one`, [others, T, 1]."""
        rows = [(self._laid_out(other)[1] == one[1]).all(1, keepdim=True) for other in others]
        return torch.stack(rows) if rows else torch.ones(1, len(one[1]), 1, dtype=torch.bool, device=one[1].device)


def _in_fp64(keywords: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() if isinstance(v, Tensor) else v for k, v in keywords.items()}
