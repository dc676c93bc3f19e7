r"""What rounding alone may do to a model's results, from runs of the fp64 reference with random roundings.

Every place where an implementation may store a value in the model's dtype (`reference.model.STORES`) gets an error
uniform over one unit in the last place, in fp64, with the routing forced.  K such runs give the variance of each
element.  It is pooled as a product of a factor per position and one per column, because K runs alone would leave each
element's variance uncertain by sqrt(2 / K).

    noise[p, v] = errors of K runs            variance[p, v] = mean_v[p] * mean_p[v] / mean

The router's logits get their variance in the same runs.  Where no permitted rounding can change the choice of a layer
at a position or at one that it sees, the position is certain, and only there results with a routing of their own are
compared.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_harness.harness.core import bounds
from moe_harness.reference import moe_block
from moe_harness.reference.model import Model, Routing, State

Run = Callable[[Tensor, State], Tensor]

RUNS = 12
ELEMENTS = 1 << 22  # of the results of runs that are made at once; more runs than that have one after the other
PRODUCTS = ("qkv", "attention", "attention_output", "gate_up", "expert_output", "mlp_output", "logits")


class RandomRounding:
    """`State.store` with the error of one rounding to `dtype` at every place, half an ulp to either side.

    Results of products get the error of their fp32 accumulation over `depth` terms too, which is what counts in fp32.
    Its terms' squares sum up to about the mean square of the results, as signs are random.  Runs are made at once, as
    more `rows` of a batch; angles have no rows of their own and are rounded for each.
    """

    def __init__(self, dtype: torch.dtype, depth: int, rows: int, seed: int):
        self.dtype, self.accumulation, self.rows = dtype, bounds.accumulation(depth), rows
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, name: str, value: Tensor) -> Tensor:
        dtype = torch.float32 if name == "angle" else self.dtype
        value = value.expand(self.rows, *value.shape) if name == "angle" else value
        width = bounds.ulp(value, dtype)
        if name in PRODUCTS:
            accumulated = self.accumulation * value.square().mean(-1, keepdim=True)
            width = (width.square() + 12 * accumulated).sqrt()  # one draw with the variance of both
        return value + self.uniform(value) * width

    def uniform(self, value: Tensor) -> Tensor:
        """Numbers between -1/2 and 1/2, one for each of `value`; 24 bits of each are enough and half the time."""
        return torch.rand(value.shape, generator=self.generator).sub_(0.5).double()


@dataclass(frozen=True)
class NoiseBound:
    """What a result [B, L, columns] may be when its routing is given: fp64 value and standard deviation.

    `routed` [B, L]: positions whose routing no permitted rounding changes, in any layer that was run, at any position
    that they see.
    """

    value: Tensor
    sigma: Tensor
    routed: Tensor

    def z(self, result: Tensor) -> Tensor:
        """(result - value) / sigma in fp64."""
        return (result.double() - self.value) / self.sigma

    def decided(self) -> Tensor:
        """Positions [B, L] of logits whose largest one no permitted rounding can overtake."""
        best = self.value.topk(2, dim=-1)
        spread = self.sigma.gather(-1, best.indices).square().sum(-1).sqrt()
        return best.values[..., 0] - best.values[..., 1] > bounds.max_limit() * spread

    def bound(self, sources: int) -> bounds.Bound:
        """For `core.compare`: positions of uncertain routing are left out; errors of a row have so many sources."""
        variance = self.sigma.square().masked_fill(~self.routed[..., None], torch.inf)
        common = torch.tensor([float(sources), 1.0], dtype=torch.float64).repeat(self.routed.numel(), 1)
        return bounds.Bound(self.value, variance, torch.zeros_like(variance), common)


def noise_bound(
    model: Model, run: Run, given: Tensor, dtype: torch.dtype, forced: Mapping[int, Routing] | None = None,
    runs: int = RUNS,
) -> NoiseBound:  # fmt: skip
    """The bound of `run`, which computes [B, L, columns] with `model` of `given` [B, ...] and a State, in `dtype`.

    The routing that fp64 chooses is forced in every noisy run, unless another one is given.
    """
    state = State(forced=forced or {})
    value = run(given, state)
    clean = {layer: logits for layer, (logits, _, _) in state.routed.items()}
    routing = {layer: (weights, ids) for layer, (_, weights, ids) in state.routed.items()}
    square, wandering = torch.zeros_like(value), {layer: torch.zeros_like(logits) for layer, logits in clean.items()}
    at_once = max(1, min(runs, ELEMENTS // max(1, value.numel())))
    for first in range(0, runs, at_once):
        copies = min(at_once, runs - first)
        rounding = RandomRounding(dtype, _depth(model), copies * len(given), first)
        again = {layer: (_times(copies, weights), _times(copies, ids)) for layer, (weights, ids) in routing.items()}
        noisy = State(forced=again, store=rounding)
        error = run(_times(copies, given), noisy).unflatten(0, (copies, -1)) - value
        square += error.square().sum(0) / runs
        for layer, (logits, _, _) in noisy.routed.items():
            rounded = logits + rounding.uniform(logits) * bounds.ulp(logits, dtype)
            wandering[layer] += (rounded.unflatten(0, (copies, -1)) - clean[layer]).square().sum(0) / runs
    by_position, by_column = square.mean(-1, keepdim=True), square.mean((0, 1), keepdim=True)
    sigma = (by_position * by_column / square.mean()).sqrt()
    routed = torch.ones(value.shape[:2], dtype=torch.bool)
    if forced is None:
        for layer, logits in clean.items():
            settled = _settled(
                logits, wandering[layer], routing[layer][1].shape[-1], moe_block.routing_rule(model.config)
            )
            routed &= settled.view(routed.shape)
    return NoiseBound(value, sigma, routed.long().cumprod(-1).bool())


def _depth(model: Model) -> int:
    """The longest sum of a product."""
    sizes = ("hidden_size", "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size",
             "kv_lora_rank", "q_lora_rank")  # fmt: skip
    return max(model.config["num_attention_heads"] * model.head_dim, *(model.config.get(key) or 0 for key in sizes))


def _times(copies: int, rows: Tensor) -> Tensor:
    """All rows, so many times."""
    return rows.repeat(copies, *(1 for _ in rows.shape[1:]))


def _settled(logits: Tensor, variance: Tensor, k: int, rule: moe_block.RoutingRule) -> Tensor:
    """Rows [T] whose choice is certain: the worst chosen and the best other are far enough apart, groups and experts.

    Scores grow with their logits, so the largest logit stands for a group.
    """
    spread = (2 * variance.mean(-1)).sqrt()
    settled = torch.ones(len(logits), dtype=torch.bool)
    if rule.num_expert_group is not None and rule.topk_group is not None:
        best = logits.unflatten(-1, (rule.num_expert_group, -1)).amax(-1)
        settled &= _apart(best, rule.topk_group, spread)
        chosen = torch.zeros_like(best, dtype=torch.bool).scatter(-1, best.topk(rule.topk_group).indices, True)
        size = logits.shape[-1] // rule.num_expert_group
        logits = logits.masked_fill(~chosen.repeat_interleave(size, dim=-1), -torch.inf)
    return settled & _apart(logits, k, spread)


def _apart(values: Tensor, k: int, spread: Tensor) -> Tensor:
    """Rows [T] whose k-th and next largest value [T, n] differ by more than roundings of size `spread` [T]."""
    if k == values.shape[-1]:
        return torch.ones(len(values), dtype=torch.bool)
    gap = values.topk(k + 1, dim=-1).values[:, k - 1 : k + 1]
    return gap[:, 0] - gap[:, 1] > bounds.max_limit() * spread


def logit_bound(
    model: Model, ids: Tensor, dtype: torch.dtype, forced: Mapping[int, Routing] | None = None, runs: int = RUNS
) -> NoiseBound:
    """The bound of all logits of ids [B, L]."""
    return noise_bound(model, model, ids, dtype, forced, runs)
