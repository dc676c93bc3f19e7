"""Faults of the choice of tokens: right steps, one of them replaced; `shows` and `hidden` name fields of a case."""

from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core.catalogue import fault
from moe_harness.harness.core.emulation import read_as_contiguous
from moe_harness.harness.stages.sampler.faults._steps import mixed, run
from moe_harness.reference.sampler import probabilities

DRAWS = {"data": "draws", "B": 4096, "V": 17}
CUT = DRAWS | {"cut": "both"}


@fault("temperature", source="GeeeekExplorer/nano-vllm/pull/249", condition="temperature 0", shows={"temperature": 0.0})
def greedy_divides_by_zero(logits: Tensor, *, temperature: Tensor, **options: Any) -> Tensor:
    """There is no greedy path: logits over a temperature of 0 are infinite or NaN, and the token is arbitrary."""
    tokens = run(logits, temperature=temperature.clamp(min=1e-10), **options)
    scaled = logits.double() / temperature.double()[:, None]
    nan = scaled.softmax(1).nan_to_num(0.0).argmax(1)
    return torch.where(temperature == 0, nan, tokens) if len(logits) else tokens


@fault("temperature", source="vllm-project/vllm/issues/22180", condition="temperature 0 and masked tokens",
       shows={"temperature": 0.0, "data": "masked"}, hidden=("data=normal",))  # fmt: skip
def greedy_rows_at_minus_one(logits: Tensor, *, temperature: Tensor, **options: Any) -> Tensor:
    """Greedy rows are divided by a temperature of -1 on the way: masked tokens become the largest, and win."""
    tokens = run(logits, temperature=temperature, **options)
    masked = (logits == -torch.inf) & (temperature == 0)[:, None]
    return torch.where(masked.any(1), masked.double().argmax(1), tokens) if len(logits) else tokens


@fault("temperature", condition="a temperature that is not 1", shows=DRAWS, hidden=("temperature=1.0",))
def temperature_ignored(logits: Tensor, *, temperature: Tensor, **options: Any) -> Tensor:
    """Draws are those at a temperature of 1."""
    return run(logits, temperature=torch.where(temperature > 0, 1.0, 0.0), **options)


@fault("temperature", condition="a temperature that is not 1", shows=DRAWS, hidden=("temperature=1.0",))
def temperature_multiplied(logits: Tensor, *, temperature: Tensor, **options: Any) -> Tensor:
    """Logits are multiplied by the temperature."""
    return run(logits, temperature=torch.where(temperature > 0, 1 / temperature.clamp(min=1e-9), 0.0), **options)


@fault("temperature", condition="rows of other temperatures", shows=DRAWS | {"temperature": -1.0},
       hidden=("temperature=1.0",))  # fmt: skip
def temperature_of_the_first_row(logits: Tensor, *, temperature: Tensor, **options: Any) -> Tensor:
    """The temperature of the first row serves the whole batch."""
    return run(logits, temperature=temperature[:1].expand(len(temperature)), **options)


@fault("top_k", condition="a top_k", shows=CUT, hidden=("cut=none",))
def top_k_ignored(logits: Tensor, *, top_k: Tensor | None = None, **options: Any) -> Tensor:
    """top_k is taken and not used."""
    return run(logits, **options)


@fault("top_k", condition="a top_k", shows=CUT | {"cut": "k"}, hidden=("cut=none",))
def one_more_than_top_k(logits: Tensor, *, top_k: Tensor | None = None, **options: Any) -> Tensor:
    """The token behind the last one is kept too."""
    return run(logits, top_k=None if top_k is None else torch.where(top_k > 0, top_k + 1, top_k), **options)


@fault("top_k", condition="a top_k of 2 or more", shows=CUT | {"cut": "k"}, hidden=("cut=none",))
def one_less_than_top_k(logits: Tensor, *, top_k: Tensor | None = None, **options: Any) -> Tensor:
    """The k-th token is cut off."""
    return run(logits, top_k=None if top_k is None else torch.where(top_k > 1, top_k - 1, top_k), **options)


@fault("top_k", condition="rows of other top_k", shows=CUT | {"cut": "k"}, hidden=("cut=none",))
def largest_top_k_for_all(logits: Tensor, *, top_k: Tensor | None = None, **options: Any) -> Tensor:
    """The batch is cut to its largest top_k."""
    widest = None if top_k is None else torch.where(top_k < 1, logits.shape[1], top_k)
    return run(logits, top_k=None if widest is None else widest.clamp(max=logits.shape[1]).amax().expand(len(widest))
               if len(widest) else top_k, **options)  # fmt: skip


@fault("top_p", source="paiml/aprender/pull/2080", condition="a top_p", shows=CUT | {"cut": "p"}, hidden=("cut=none",))
def top_p_ignored(logits: Tensor, *, top_p: Tensor | None = None, **options: Any) -> Tensor:
    """top_p is taken and not used: tokens outside of the nucleus leak."""
    return run(logits, **options)


@fault("top_p", source="Biohub/esm/pull/360", condition="a top_p", shows=CUT | {"cut": "p"}, hidden=("cut=none",))
def crossing_token_dropped(logits: Tensor, *, temperature: Tensor, top_k: Tensor | None = None,
                           top_p: Tensor | None = None, **options: Any) -> Tensor:  # fmt: skip
    """The token that makes the sum reach top_p is cut off: what is kept always weighs less than top_p."""

    def short(logits: Tensor, *, temperature: Tensor, top_k: Tensor | None, top_p: Tensor | None) -> Tensor:
        p = probabilities(logits, temperature=temperature, top_k=top_k)
        if top_p is None:
            return p
        sorted_p, order = p.sort(1, descending=True)
        kept = (sorted_p.cumsum(1) <= top_p.double()[:, None]) | (top_p >= 1)[:, None]
        kept[:, 0] = True
        return p * torch.zeros_like(p).scatter(1, order, kept.double())

    return run(logits, temperature=temperature, top_k=top_k, top_p=top_p, distribution=short, **options)


@fault("top_p", condition="top_k and top_p together", shows=CUT, hidden=("cut=k", "cut=p"))
def top_p_of_the_whole_vocabulary(logits: Tensor, *, temperature: Tensor, top_k: Tensor | None = None,
                                  top_p: Tensor | None = None, **options: Any) -> Tensor:  # fmt: skip
    """top_p is reached by shares of the whole vocabulary, not of what top_k left: too much is kept."""

    def whole(logits: Tensor, *, temperature: Tensor, top_k: Tensor | None, top_p: Tensor | None) -> Tensor:
        first = probabilities(logits, temperature=temperature, top_k=top_k)
        second = probabilities(logits, temperature=temperature, top_p=top_p)
        return first * (second > 0)

    return run(logits, temperature=temperature, top_k=top_k, top_p=top_p, distribution=whole, **options)


@fault("top_p", condition="a top_p and a temperature that is not 1", shows=CUT | {"cut": "p", "temperature": 2.5},
       hidden=("temperature=1.0",))  # fmt: skip
def top_p_before_the_temperature(logits: Tensor, *, temperature: Tensor, top_k: Tensor | None = None,
                                 top_p: Tensor | None = None, **options: Any) -> Tensor:  # fmt: skip
    """The nucleus is that at a temperature of 1."""

    def cold(logits: Tensor, *, temperature: Tensor, top_k: Tensor | None, top_p: Tensor | None) -> Tensor:
        warm = probabilities(logits, temperature=temperature, top_k=top_k)
        nucleus = probabilities(logits, temperature=(temperature > 0).double(), top_k=top_k, top_p=top_p)
        return warm * (nucleus > 0)

    return run(logits, temperature=temperature, top_k=top_k, top_p=top_p, distribution=cold, **options)


@fault("randomness", source="sgl-project/mini-sglang/pull/88", condition="more than one seed", shows=DRAWS,
       hidden=("vary=positions",))  # fmt: skip
def seed_ignored(logits: Tensor, *, seeds: Tensor, **options: Any) -> Tensor:
    """All requests draw with the same random numbers at a position."""
    return run(logits, seeds=seeds * 0, **options)


@fault("randomness", condition="more than one position", shows=DRAWS | {"vary": "positions"}, hidden=("vary=seeds",))
def position_ignored(logits: Tensor, *, positions: Tensor, **options: Any) -> Tensor:
    """A request draws with the same random numbers at every position: it repeats itself."""
    return run(logits, positions=positions * 0, **options)


@fault("randomness", condition="seeds and positions that vary together", shows=DRAWS | {"vary": "grid"},
       hidden=("vary=seeds", "vary=positions"))  # fmt: skip
def seed_and_position_added(logits: Tensor, *, seeds: Tensor, positions: Tensor, **options: Any) -> Tensor:
    """The generator starts from seed + position: request 1 draws at 0 what request 0 draws at 1."""
    return run(logits, seeds=seeds + positions, positions=positions * 0, **options)


@fault("randomness", condition="seeds and positions that vary together", shows=DRAWS | {"vary": "grid"},
       hidden=("vary=seeds", "vary=positions"))  # fmt: skip
def seed_and_position_multiplied(logits: Tensor, *, seeds: Tensor, positions: Tensor, **options: Any) -> Tensor:
    """The generator starts from (seed + 1) * (position + 1): the two may be exchanged."""
    return run(logits, seeds=(seeds + 1) * (positions + 1), positions=positions * 0, **options)


@fault("randomness", condition="another place in the batch", shows=DRAWS | {"variant": "row_permutation"})
def row_in_the_batch_drawn_from(logits: Tensor, *, seeds: Tensor, **options: Any) -> Tensor:
    """The row's number in the batch enters its random numbers: what else is in the batch changes a request."""
    return run(logits, seeds=seeds + 1000003 * torch.arange(len(seeds)), **options)


@fault("randomness", condition="a second call", shows=DRAWS | {"variant": "repeated"}, stateful=True)
def generator_of_the_process(logits: Tensor, **options: Any) -> Tensor:
    """Draws come from the process's own generator, and seeds are ignored: no request can be repeated."""
    return run(
        logits, **options, uniform=lambda seeds, positions, count: torch.rand(len(seeds), count, dtype=torch.float64)
    )


@fault("randomness", condition="rows that are cut", shows=DRAWS)
def one_random_number_a_row(logits: Tensor, **options: Any) -> Tensor:
    """All tokens of a row share one random number, so that the likeliest always wins."""
    return run(logits, **options, uniform=lambda seeds, positions, count: mixed(seeds, positions, 1).expand(-1, count))


@fault("randomness", shows=DRAWS)
def gumbel_without_its_second_logarithm(logits: Tensor, **options: Any) -> Tensor:
    """The noise added to log-probabilities is -log(u) instead of -log(-log(u)): the unlikely come up too often."""
    return run(logits, **options, choose=lambda p, u: (p.clamp(min=1e-300).log() - u.log()).masked_fill(
        p <= 0, -torch.inf).argmax(1))  # fmt: skip


@fault("randomness", shows=DRAWS | {"V": 300})
def six_bits_of_randomness(logits: Tensor, **options: Any) -> Tensor:
    """Random numbers are of 6 bits: ties go to the first of the tokens, and rare tokens never come."""

    def coarse(seeds: Tensor, positions: Tensor, count: int) -> Tensor:
        return ((mixed(seeds, positions, count) * 64).floor() + 0.5) / 64

    return run(logits, **options, uniform=coarse)


@fault("tokens", condition="masked tokens", shows={"data": "masked_hot"}, hidden=("data=normal",))
def masked_tokens_drawn(logits: Tensor, **options: Any) -> Tensor:
    """Logits of -inf become -10,000, which a high temperature brings back."""
    return run(logits.clamp(min=-1e4), **options)


@fault("tokens", condition="more than one row", shows={"temperature": 0.0, "data": "greedy"}, hidden=("B=1",))
def logits_of_the_next_row(logits: Tensor, **options: Any) -> Tensor:
    """Rows are one apart: every request gets the token of its neighbour."""
    return run(logits.roll(1, 0), **options)


@fault("tokens", condition="all logits below 0", shows={"temperature": 0.0, "data": "far_down", "V": 33})
def padded_columns_as_0(logits: Tensor, **options: Any) -> Tensor:
    """Columns behind the vocabulary are read as 0: where all logits are below that, no token of the model wins."""
    padded = torch.nn.functional.pad(logits, (0, -logits.shape[1] % 64))
    return run(padded, **options)


@fault("tokens", condition="the last token is the likeliest", shows={"temperature": 0.0, "data": "edge_values"})
def last_token_never_chosen(logits: Tensor, **options: Any) -> Tensor:
    """The loop over the vocabulary ends one early."""
    return run(logits[:, :-1] if logits.shape[1] > 1 else logits, **options)


@fault("tokens", condition="a vocabulary that is no multiple of 16", shows=DRAWS, hidden=("V=16",))
def vocabulary_rounded_down(logits: Tensor, **options: Any) -> Tensor:
    """The last, partial block of the vocabulary is not looked at."""
    return run(logits[:, : logits.shape[1] // 16 * 16 or logits.shape[1]], **options)


@fault("tokens", condition="a padded buffer of logits", shows={"layout": "logits:padded", "temperature": 0.0},
       hidden=("layout=",))  # fmt: skip
def logits_stride_assumed(logits: Tensor, **options: Any) -> Tensor:
    """Logits are read as contiguous."""
    return run(read_as_contiguous(logits).nan_to_num(0.0), **options)


@fault("tokens", condition="always", sign="inputs")
def logits_scaled_in_place(logits: Tensor, *, temperature: Tensor, **options: Any) -> Tensor:
    """Logits are divided by the temperature where they lie: what reads them afterwards is wrong."""
    tokens = run(logits, temperature=temperature, **options)
    logits.div_(torch.where(temperature > 0, temperature, 2.0)[:, None].to(logits.dtype))
    return tokens
