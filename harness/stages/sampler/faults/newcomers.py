"""Mistakes of first samplers: temperatures, cuts, the way from a random number to a token, and seeds."""

from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core.catalogue import fault
from moe_harness.harness.stages.sampler.faults._steps import Step, mixed, run
from moe_harness.reference.sampler import probabilities

DRAWS = {"data": "draws", "B": 4096, "V": 17}
CUT_P = DRAWS | {"cut": "p"}
CUT_K = DRAWS | {"cut": "k"}


def kept(keep: Step, logits: Tensor, temperature: Tensor, top_k: Tensor | None, top_p: Tensor | None) -> Tensor:
    """What is drawn from where `keep(sorted p, top_p [B, 1])` says which of the tokens behind top_k stay."""
    p = probabilities(logits, temperature=temperature, top_k=top_k)
    if top_p is None:
        return p
    ordered, order = p.sort(1, descending=True)
    stay = keep(ordered, top_p.double()[:, None]) | (top_p >= 1)[:, None]
    stay[:, 0] |= ~stay.any(1)
    p = p * torch.zeros_like(p).scatter(1, order, stay.double())
    return p / p.sum(1, keepdim=True)


def cutting(keep: Step) -> Step:
    """A `distribution` with another top_p."""

    def distribution(logits: Tensor, *, temperature: Tensor, top_k: Tensor | None, top_p: Tensor | None) -> Tensor:
        return kept(keep, logits, temperature, top_k, top_p)

    return distribution


def by_sums(p: Tensor, u: Tensor) -> Tensor:
    """The place at which the running sum of p passes the random number, V where it never does."""
    return torch.searchsorted(p.cumsum(1), u[:, :1].contiguous(), right=True)[:, 0]


@fault("temperature", condition="a temperature that is not 1", shows=DRAWS, hidden=("temperature=1.0",))
def temperature_applied_twice(logits: Tensor, *, temperature: Tensor, **options: Any) -> Tensor:
    """Logits are divided by the temperature twice."""
    return run(logits, temperature=temperature * temperature, **options)


@fault("temperature", condition="a temperature below the floor", shows=DRAWS | {"temperature": 0.3},
       hidden=("temperature=1.0",), variants={"floor": (0.5, 0.1, 0.7, 1.0)})  # fmt: skip
def temperature_floored(logits: Tensor, *, temperature: Tensor, floor: float = 0.5, **options: Any) -> Tensor:
    """Temperatures between 0 and a floor are raised to it."""
    raised = torch.where(temperature > 0, temperature.clamp(min=floor), temperature)
    return run(logits, temperature=raised, **options)


@fault("temperature", condition="a temperature above 0", shows=DRAWS, hidden=("temperature=0.0",))
def softmax_of_the_softmax(logits: Tensor, *, temperature: Tensor, **options: Any) -> Tensor:
    """Probabilities are taken for logits once more: the draws are nearly uniform."""
    return run(logits.double().softmax(1), temperature=temperature, **options)


@fault("top_k", condition="rows of other top_k", shows=CUT_K, hidden=("cut=none",))
def top_k_of_the_first_row(logits: Tensor, *, top_k: Tensor | None = None, **options: Any) -> Tensor:
    """The top_k of the first row serves the whole batch."""
    return run(logits, top_k=None if top_k is None else top_k[:1].expand(len(top_k)), **options)


@fault("top_k", condition="a top_k of 0", shows=CUT_K, hidden=("cut=none",))
def top_k_of_0_keeps_one(logits: Tensor, *, top_k: Tensor | None = None, **options: Any) -> Tensor:
    """A top_k of 0 keeps one token where it should cut nothing."""
    return run(logits, top_k=None if top_k is None else top_k.clamp(min=1), **options)


@fault("top_k", condition="a top_k that cuts", shows=CUT_K, hidden=("cut=none",))
def least_likely_kept(logits: Tensor, *, temperature: Tensor, top_k: Tensor | None = None, **options: Any) -> Tensor:
    """The sort is in ascending order: the top_k least likely tokens are kept."""

    def turned(logits: Tensor, *, temperature: Tensor, top_k: Tensor | None, top_p: Tensor | None) -> Tensor:
        if top_k is None:
            return probabilities(logits, temperature=temperature, top_p=top_p)
        limit = torch.where(top_k < 1, logits.shape[1], top_k)[:, None]
        rank = logits.argsort(1).argsort(1)
        return probabilities(logits.masked_fill(rank >= limit, -torch.inf), temperature=temperature, top_p=top_p)

    return run(logits, temperature=temperature, top_k=top_k, distribution=turned, **options)


@fault("top_p", condition="rows of other top_p", shows=CUT_P, hidden=("cut=none",))
def top_p_of_the_first_row(logits: Tensor, *, top_p: Tensor | None = None, **options: Any) -> Tensor:
    """The top_p of the first row serves the whole batch."""
    return run(logits, top_p=None if top_p is None else top_p[:1].expand(len(top_p)), **options)


@fault("top_p", condition="a top_p below 1", shows=CUT_P, hidden=("cut=none",))
def one_token_more_than_top_p(logits: Tensor, **options: Any) -> Tensor:
    """The token behind the one that makes the sum reach top_p is kept too."""

    def keep(p: Tensor, top_p: Tensor) -> Tensor:
        return torch.nn.functional.pad((p.cumsum(1) - p < top_p)[:, :-1], (1, 0), value=True)

    return run(logits, **options, distribution=cutting(keep))


@fault("top_p", condition="a top_p below 1", shows=CUT_P, hidden=("cut=none",))
def top_p_as_min_p(logits: Tensor, **options: Any) -> Tensor:
    """Tokens are kept whose probability is at least top_p times the largest, as min_p means it."""
    return run(logits, **options, distribution=cutting(lambda p, top_p: p >= top_p * p[:, :1]))


@fault("top_p", condition="a top_p below 1", shows=CUT_P, hidden=("cut=none",))
def tokens_below_1_minus_top_p_cut(logits: Tensor, **options: Any) -> Tensor:
    """Each token alone is compared with 1 - top_p, and no sum is taken."""
    return run(logits, **options, distribution=cutting(lambda p, top_p: p >= 1 - top_p))


@fault("top_p", condition="a top_p below 1", shows=CUT_P, hidden=("cut=none",))
def nucleus_of_1_minus_top_p(logits: Tensor, **options: Any) -> Tensor:
    """The sum goes as far as 1 - top_p: the cut is taken for what is kept."""
    return run(logits, **options, distribution=cutting(lambda p, top_p: p.cumsum(1) - p < 1 - top_p))


@fault("tokens", condition="a temperature above 0", shows=DRAWS, hidden=("temperature=0.0",))
def place_in_the_order_for_the_token(logits: Tensor, **options: Any) -> Tensor:
    """The place among the sorted tokens is returned instead of the token that stands there."""

    def place(p: Tensor, u: Tensor) -> Tensor:
        ordered = p.sort(1, descending=True).values
        greedy = p.amax(1) >= 1
        token = by_sums(ordered, u).clamp(max=p.shape[1] - 1)
        return torch.where(greedy, p.argmax(1), token)

    return run(logits, **options, choose=place)


@fault("randomness", condition="a temperature above 0", shows=DRAWS, hidden=("temperature=0.0",))
def token_before_the_drawn_one(logits: Tensor, **options: Any) -> Tensor:
    """The running sum is compared one place off: the token before the one that is drawn."""

    def before(p: Tensor, u: Tensor) -> Tensor:
        return torch.where(p.amax(1) >= 1, p.argmax(1), (by_sums(p, u) - 1).clamp(min=0))

    return run(logits, **options, choose=before)


@fault("randomness", condition="a temperature above 0", shows=DRAWS, hidden=("temperature=0.0",))
def kept_tokens_equally_likely(logits: Tensor, **options: Any) -> Tensor:
    """What the cuts leave is drawn from evenly, whatever the probabilities."""
    return run(logits, **options, choose=lambda p, u: u.masked_fill(p <= 0, 2.0).argmin(1))


@fault("randomness", condition="a temperature above 0", shows=DRAWS, hidden=("temperature=0.0",))
def noise_multiplied(logits: Tensor, **options: Any) -> Tensor:
    """Probabilities are multiplied by the exponential variates instead of divided by them."""
    return run(logits, **options, choose=lambda p, u: (p * -u.log()).argmax(1))


def _left_over(to_last: bool) -> Step:
    def choose(p: Tensor, u: Tensor) -> Tensor:
        token = by_sums(p, u)
        rest = torch.full_like(token, p.shape[1] - 1) if to_last else p.argmax(1)
        return torch.where(token < p.shape[1], token, rest)

    return choose


def _not_normalised(logits: Tensor, *, temperature: Tensor, top_k: Tensor | None, top_p: Tensor | None) -> Tensor:
    p = probabilities(logits, temperature=temperature)
    return p * (probabilities(logits, temperature=temperature, top_k=top_k, top_p=top_p) > 0)


@fault("randomness", condition="a cut", shows=CUT_K, hidden=("cut=none",))
def what_was_cut_goes_to_the_last_token(logits: Tensor, **options: Any) -> Tensor:
    """Probabilities are not normalised behind the cuts: where the sum never passes the number, the last token comes."""
    return run(logits, **options, distribution=_not_normalised, choose=_left_over(True))


@fault("randomness", condition="a cut", shows=CUT_P | {"temperature": 2.5}, hidden=("cut=none",))
def what_was_cut_goes_to_the_likeliest(logits: Tensor, **options: Any) -> Tensor:
    """Probabilities are not normalised behind the cuts: where the sum never passes the number, the likeliest comes."""
    return run(logits, **options, distribution=_not_normalised, choose=_left_over(False))


@fault("randomness", condition="seeds that differ in their upper bits", shows=DRAWS, hidden=("vary=positions",),
       variants={"bits": (8, 4, 10)})  # fmt: skip
def seeds_in_few_bits(logits: Tensor, *, seeds: Tensor, bits: int = 8, **options: Any) -> Tensor:
    """Only the lower bits of a seed count: requests whose seeds differ above them draw alike."""
    return run(logits, seeds=seeds % (1 << bits), **options)


@fault("randomness", condition="positions of 256 and more", shows=DRAWS | {"vary": "positions"},
       hidden=("vary=seeds",), variants={"bits": (8, 4, 10)})  # fmt: skip
def positions_in_few_bits(logits: Tensor, *, positions: Tensor, bits: int = 8, **options: Any) -> Tensor:
    """Only the lower bits of a position count: a request repeats itself."""
    return run(logits, positions=positions % (1 << bits), **options)


@fault("randomness", condition="more than one seed", shows=DRAWS, hidden=("vary=positions",))
def seed_of_the_first_row(logits: Tensor, *, seeds: Tensor, **options: Any) -> Tensor:
    """The seed of the first row serves the whole batch."""
    return run(logits, seeds=seeds[:1].expand(len(seeds)), **options)


WIDE = {"data": "draws", "B": 256, "V": 16500, "temperature": 1.0}


@fault("randomness", condition="vocabularies wider than a block", shows=WIDE, hidden=("V=300",),
       variants={"block": (4096, 1024, 2048, 8192)})  # fmt: skip
def random_numbers_of_each_block_alike(logits: Tensor, *, block: int = 4096, **options: Any) -> Tensor:
    """Random numbers are counted within a block of the vocabulary: tokens a block apart have the same one."""

    def uniform(seeds: Tensor, positions: Tensor, count: int) -> Tensor:
        return mixed(seeds, positions, min(count, block)).repeat(1, -(-count // block))[:, :count]

    return run(logits, **options, uniform=uniform)


@fault(
    "top_k", condition="a top_k above 64", hidden=("V=24",), variants={"most": (64, 32, 256)},
    shows={"data": "draws", "B": 1024, "V": 4100, "cut": "k", "temperature": 2.5},
)  # fmt: skip
def top_k_of_64_at_most(logits: Tensor, *, top_k: Tensor | None = None, most: int = 64, **options: Any) -> Tensor:
    """As many candidates as one pass sorts: a larger top_k is cut down to them."""
    few = None if top_k is None else torch.where(top_k < 1, top_k, top_k.clamp(max=most))
    return run(logits, top_k=few, **options)


@fault("top_p", condition="more than 64 tokens in the nucleus",
       shows={"data": "draws", "B": 1024, "V": 700, "cut": "p", "temperature": 2.5}, hidden=("V=24",),
       variants={"most": (64, 32, 100)})  # fmt: skip
def nucleus_of_64_at_most(
    logits: Tensor, *, top_k: Tensor | None = None, top_p: Tensor | None = None, most: int = 64, **options: Any
) -> Tensor:
    """The nucleus is looked for among the 64 likeliest tokens."""
    if top_p is not None:
        limit = torch.where(top_p < 1, most, logits.shape[1])
        top_k = limit if top_k is None else torch.where(top_k < 1, limit, torch.minimum(top_k.long(), limit))
    return run(logits, top_k=top_k, top_p=top_p, **options)


@fault("randomness", condition="more than one position", shows=DRAWS | {"vary": "grid"}, hidden=("vary=seeds",),
       variants={"step": (2, 4, 8)})  # fmt: skip
def positions_in_steps(logits: Tensor, *, positions: Tensor, step: int = 2, **options: Any) -> Tensor:
    """Positions next to each other, two at a time, draw with the same random numbers."""
    return run(logits, positions=positions // step, **options)


@fault("randomness", condition="more than one seed", shows=DRAWS | {"vary": "grid"}, hidden=("vary=positions",),
       variants={"step": (2, 4, 8)})  # fmt: skip
def seeds_in_steps(logits: Tensor, *, seeds: Tensor, step: int = 2, **options: Any) -> Tensor:
    """Seeds next to each other, two at a time, draw with the same random numbers."""
    return run(logits, seeds=seeds // step, **options)
