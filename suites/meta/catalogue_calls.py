"""From the few named parameters of a fault's example to the arguments of a call of its stage."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_harness.harness.core.case import case_types
from moe_harness.harness.core.stage import find_stage


class Call(NamedTuple):
    """One call of a stage: positional and keyword arguments."""

    args: tuple[Any, ...]
    options: dict[str, Any]


def experts_call(
    *, T: int = 5, H: int = 32, I: int = 24, E: int = 6, k: int = 2, dtype: str = "float32", seed: int = 0,  # noqa: E741
    activation: str = "silu", ids: str = "distinct", ids_dtype: str = "int64", only: str | None = None,
    expert_map: str | None = None, weights: str = "random", layout: str = "contiguous", gain: float = 1.0,
    special: str | None = None,
) -> Call:  # fmt: skip
    random, kind = torch.Generator().manual_seed(seed), getattr(torch, dtype)
    table, local = expert_table(expert_map, E)
    chosen = expert_ids(T, E, k, ids, only, random)
    hidden = (gain * torch.randn(T, H, generator=random)).to(kind)
    gate_up = (torch.randn(local, 2 * I, H, generator=random) / H**0.5).to(kind)
    down = (torch.randn(local, H, I, generator=random) / max(I, 1) ** 0.5).to(kind)
    shares = routing_weights(chosen, weights, random)
    if special == "nan_token":
        hidden[0, 0] = torch.nan
    if special == "inf_expert":
        down[chosen[0, 0], 0, 0] = torch.inf
    if special == "nan_expert":
        gate_up[chosen[0, 0]] = torch.nan
    chosen = chosen.to(getattr(torch, ids_dtype))
    if layout in ("padded_rows", "transposed"):
        hidden = laid_out(hidden, layout)
    if layout == "padded_weights":
        gate_up, down = laid_out(gate_up), laid_out(down)
    if layout == "padded_routing":
        shares, chosen = laid_out(shares), laid_out(chosen)
    return Call((hidden, gate_up, down, shares, chosen), {"activation": activation, "expert_map": table})


def expert_table(kind: str | None, experts: int) -> tuple[Tensor | None, int]:
    """An expert map over `experts` global experts and the number of local ones."""
    everyone = torch.arange(experts)
    owned = {
        None: everyone >= 0, "identity": everyone >= 0, "reversed": everyone >= 0,
        "half": everyone >= experts // 2, "strided": everyone % 2 == 1,
    }[kind]  # fmt: skip
    table = torch.where(owned, owned.cumsum(0) - 1, -1)
    if kind == "reversed":
        table = table.flip(0)
    return (None if kind is None else table), int(owned.sum())


def expert_ids(tokens: int, experts: int, slots: int, kind: str, only: str | None, random: torch.Generator) -> Tensor:
    """[T, k] ids of the wanted kind, distinct in a row unless the kind says otherwise."""
    pool = torch.arange({None: 0, "even": 0, "odd": 1}[only], experts, 1 if only is None else 2)
    ids = pool[torch.rand(tokens, len(pool), generator=random).argsort(1)[:, : min(slots, len(pool))]]
    if kind == "high":
        ids = experts - 1 - ids % 8
    if kind == "one_expert":
        ids = torch.full((tokens, slots), min(1, experts - 1))
    if kind == "duplicates":
        ids[:, 1] = ids[:, 0]
    masked = {
        "masked": (slice(None, None, 2), slice(-1, None)), "masked_first": (slice(None, None, 2), slice(0, 1)),
        "masked_rows": (slice(None, None, 2),), "all_masked": (slice(None),),
    }  # fmt: skip
    if kind in masked:
        ids[masked[kind]] = -1
    return ids


def routing_weights(ids: Tensor, kind: str, random: torch.Generator) -> Tensor:
    """[T, k] weights of the wanted kind."""
    weights = 0.1 + torch.rand(ids.shape, generator=random)
    if kind == "ones":
        weights = torch.ones_like(weights)
    if kind == "normalised":
        weights = weights / weights.sum(1, keepdim=True)
    if kind == "signed":
        weights[:, 0] *= -1
    if kind == "nan_masked":
        weights[ids < 0] = torch.nan
    return weights


def laid_out(tensor: Tensor, layout: str = "padded_rows") -> Tensor:
    """The same values with other strides; what lies between the rows is NaN, or a huge integer."""
    if layout == "transposed":
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    filler = torch.nan if tensor.is_floating_point() else 2**30
    wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 8), filler, dtype=tensor.dtype)
    wide[..., : tensor.shape[-1]] = tensor
    return wide[..., : tensor.shape[-1]]


def call_of(stage: str, **fields: Any) -> Call:
    """The call of a case of the stage."""
    call = find_stage(stage).build(case_types()[stage](**fields), "cpu")
    return Call(tuple(call.args.values()), call.keywords)


def moe_block_call(
    *, family: str = "qwen3_moe", T: int = 5, H: int = 32, I: int = 24, E: int = 8, k: int = 3,  # noqa: E741
    dtype: str = "float32", seed: int = 0, **config: Any,
) -> Call:  # fmt: skip
    random, kind = torch.Generator().manual_seed(seed), getattr(torch, dtype)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=random) / shape[-1] ** 0.5).to(kind)

    weights = {"gate.weight": 2 * normal(E, H), "experts.gate_up_proj": normal(E, 2 * I, H)}
    weights["experts.down_proj"] = normal(E, H, I)
    prefix = {"qwen3_moe": None, "mixtral": None, "deepseek_v2": "shared_experts", "deepseek_v3": "shared_experts"}
    if shared := prefix.get(family, "shared_expert"):
        shapes = {"gate_proj": (16, H), "up_proj": (16, H), "down_proj": (H, 16)}
        weights |= {f"{shared}.{name}.weight": normal(*shape) for name, shape in shapes.items()}
    if shared == "shared_expert":
        weights["shared_expert_gate.weight"] = normal(1, H)
    if family == "deepseek_v3":
        weights["gate.e_score_correction_bias"] = torch.randn(E, generator=random)
        config = {"n_group": 2, "topk_group": 2, **config}
    return Call((normal(T, H) * H**0.5, weights, {"model_type": family, "num_experts_per_tok": k, **config}), {})


BUILDERS: dict[str, Callable[..., Call]] = {
    "experts": experts_call, "router": partial(call_of, "router"), "grouped_linear": partial(call_of, "grouped_linear"),
    "shared_expert_gate": partial(call_of, "shared_expert_gate"), "moe_block": moe_block_call,
}  # fmt: skip

# What another call before the judged one looks like.
BEFORE: dict[str, dict[str, Any]] = {
    "unmasked": {"ids": "distinct"}, "fewer_tokens": {"T": 3}, "other_ids": {"seed": 1}, "other_weights": {"seed": 1},
    "other_logits": {"seed": 1}, "other_sizes": {"seed": 1},
}  # fmt: skip
