r"""What rounding alone may do to a model's logits, from runs of the fp64 reference with random roundings.

Every place where an implementation may store a value in the model's dtype (`reference.model.STORES`) gets an error
uniform over one unit in the last place, in fp64, with the routing forced.  K such runs give the variance of each logit.
It is pooled as a product of a factor per position and one per vocabulary entry, because K runs alone would leave each
element's variance uncertain by sqrt(2 / K): the errors enter the head as a vector, which each of its rows weighs.

    noise[p, v] = errors of K runs            variance[p, v] = mean_v[p] * mean_p[v] / mean
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_harness.harness.core import bounds
from moe_harness.reference.model import Model, Routing, State

RUNS = 12


PRODUCTS = ("qkv", "attention", "attention_output", "gate_up", "expert_output", "mlp_output", "logits")


class RandomRounding:
    """`State.store` with the error of one rounding to `dtype` at every place, half an ulp to either side.

    Results of products get the error of their fp32 accumulation over `depth` terms too, which is what counts in fp32.
    Its terms' squares sum up to about the mean square of the results, as signs are random.
    """

    def __init__(self, dtype: torch.dtype, depth: int, seed: int):
        self.dtype, self.accumulation = dtype, bounds.accumulation(depth)
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, name: str, value: Tensor) -> Tensor:
        dtype = torch.float32 if name == "angle" else self.dtype
        out = value + (self._draw(value) - 0.5) * bounds.ulp(value, dtype)
        if name in PRODUCTS:
            variance = self.accumulation * value.square().mean(-1, keepdim=True)
            out += (self._draw(value) - 0.5) * (12 * variance).sqrt()
        return out

    def _draw(self, value: Tensor) -> Tensor:
        return torch.rand(value.shape, generator=self.generator, dtype=torch.float64)


@dataclass(frozen=True)
class LogitBound:
    """What logits [B, L, V] may be when their routing is given: fp64 value and standard deviation."""

    value: Tensor
    sigma: Tensor

    def z(self, logits: Tensor) -> Tensor:
        """(logits - value) / sigma in fp64."""
        return (logits.double() - self.value) / self.sigma

    def certain(self) -> Tensor:
        """Positions [B, L] whose largest logit no permitted rounding can overtake."""
        best = self.value.topk(2, dim=-1)
        gap = best.values[..., 0] - best.values[..., 1]
        spread = self.sigma.gather(-1, best.indices).square().sum(-1).sqrt()
        return gap > bounds.max_limit() * spread


def logit_bound(model: Model, ids: Tensor, dtype: torch.dtype, forced: dict[int, Routing] | None = None) -> LogitBound:
    """The bound for `model` on ids [B, L] in `dtype`; its own fp64 routing is forced unless another is given."""
    state = State(forced=forced or {})
    value = model(ids, state)
    routing = forced or {layer: (weights, chosen) for layer, (_, weights, chosen) in state.routed.items()}
    depth = max(weight.shape[-1] for weight in model.weights.values())
    noisy = (State(forced=routing, store=RandomRounding(dtype, depth, seed)) for seed in range(RUNS))
    errors = [model(ids, state) - value for state in noisy]
    square = torch.stack(errors).square().mean(0)
    by_position, by_entry = square.mean(-1, keepdim=True), square.mean((0, 1), keepdim=True)
    return LogitBound(value, (by_position * by_entry / square.mean()).sqrt())
