"""The stage `rope_cache`: data whose faults show, and what is right of its result and of both caches."""

from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core.call import INTS, Builder, Call
from moe_harness.harness.core.stage import Declared, Output, Stage, Truths
from moe_harness.harness.stages.rope_cache.bound import rotated_heads, untouched
from moe_harness.harness.stages.rope_cache.cases import RopeCacheCase
from moe_harness.harness.stages.rope_cache.contract import ROUNDINGS
from moe_harness.reference.rope_cache import angles

# Up to the contexts that most released models have, and up to the longest.
FAR = {"random": 3000, "far": 130_000, "farther": 1_000_000}
SPARE = 3  # pages beyond those that the slots would fill, so that a wrong slot has somewhere to go


class RopeCache(Stage):
    """Norm, rotation and the write to the cache."""

    def build(self, case: RopeCacheCase, device: str) -> Call:
        draw = Builder(case, device)
        ints = INTS[case.ids]
        q, k, v = (_heads(case, draw, heads, name) for name, heads in (("q", case.Hq), ("k", case.Hk), ("v", case.Hk)))
        pages = -(-case.T // case.page) + SPARE if case.data != "large" else (1 << 31) // (case.page * case.Hk * case.D)
        args = {
            "q": draw.place("q", q), "k": draw.place("k", k), "v": draw.place("v", v),
            "positions": draw.place("positions", _positions(case, draw), ints),
            "slots": draw.place("slots", _slots(case, draw, pages * case.page), ints),
            "key_cache": _cache(case, draw, "key_cache", pages),
            "value_cache": _cache(case, draw, "value_cache", pages),
        }  # fmt: skip
        weights = {
            name: draw.place(name, draw.normal(case.D) * 0.3 + 1) if case.norms in ("both", name[0]) else None
            for name in ("q_norm", "k_norm")
        }
        return Call(case, args, weights | {"eps": case.eps, "theta": case.theta}, draw.arena)

    def outputs(self, call: Call) -> list[Output]:
        q, keys = call.args["q"], call.args["key_cache"]
        inside = ("key_cache", "value_cache")
        return [
            Output("the result", tuple(q.shape), q.dtype),
            *(Output(name, tuple(keys.shape), q.dtype, inside=name) for name in inside),
        ]

    def expect(self, call: Call, declared: Declared) -> Any:
        q, k, v, positions, slots, key_cache, value_cache = call.args.values()
        rounds, keywords = frozenset(ROUNDINGS if declared is None else declared), call.keywords
        turn = angles(positions, q.shape[2], keywords["theta"])

        def turned(x: Tensor, weight: Tensor | None) -> Any:
            eps = keywords.get("eps", 1e-6)
            return rotated_heads(x, turn, weight, eps=eps, rounds=rounds, dtype=x.dtype)

        result, keys = turned(q, keywords.get("q_norm")), turned(k, keywords.get("k_norm"))
        cached = untouched(key_cache)
        kept = (slots >= 0).nonzero()[:, 0]
        at = slots[kept].long()
        page, offset = at // key_cache.shape[1], at % key_cache.shape[1]
        for whole, part in ((cached.value, keys.value), (cached.variance, keys.variance), (cached.shared, keys.shared)):
            whole[page, offset] = part[kept]
        of_rows = cached.sources.view(*key_cache.shape[:3], 2)
        of_rows[page, offset] = keys.sources.view(*k.shape[:2], 2)[kept]
        values = value_cache.clone()
        values[page, offset] = v[kept]
        return result, cached, untouched(values)

    def exact_value(self, call: Call) -> Truths:
        """Nothing is turned and nothing normalised."""
        q, k, v, _, slots, key_cache, value_cache = call.args.values()
        keys, values = key_cache.clone(), value_cache.clone()
        for token, slot in enumerate(slots.tolist()):
            if slot >= 0:
                page, offset = divmod(slot, key_cache.shape[1])
                keys[page, offset], values[page, offset] = k[token], v[token]
        return q.clone(), keys, values

    def place_of(self, call: Call, row: int, column: int) -> dict[str, Any]:
        token, head = divmod(row, call.args["q"].shape[1])
        return {"token": token, "head": head, "element": column}


STAGE = RopeCache()


def _heads(case: RopeCacheCase, draw: Builder, heads: int, name: str) -> Tensor:
    if case.data in ("exact", "large"):
        return draw.integers(-100, 101, (case.T, heads, case.D)).to(draw.dtype)
    x = draw.large_normal(case.T, heads, case.D).float()
    middle = case.T // 2
    if case.data in ("k_nan", "v_inf") and name == case.data[0]:
        x[middle, 0, case.D // 3] = float(case.data[2:])
    elif case.data == "spike":
        x[:, :, case.D // 2] = 300.0  # its square is beyond fp16
    return x * {"tiny": 2.0**-9, "huge": 2.0 ** (9 if case.dtype == "fp16" else 20)}.get(case.data, 1.0)


def _positions(case: RopeCacheCase, draw: Builder) -> Tensor:
    rows = torch.arange(case.T)
    if case.positions not in FAR:
        return {"row": rows, "zero": 0 * rows}[case.positions]
    return draw.integers(1, FAR[case.positions], (case.T,))


def _slots(case: RopeCacheCase, draw: Builder, population: int) -> Tensor:
    if case.data == "large":
        return population - 1 - torch.arange(case.T)
    chosen = torch.randperm(population, generator=draw.generator)[: case.T]
    if case.slots == "backwards":
        return chosen.sort(descending=True).values
    off = {"all": chosen < 0, "none": chosen >= 0, "some": torch.arange(case.T) % 3 == 1}[case.slots]
    return torch.where(off, -1, chosen)


def _cache(case: RopeCacheCase, draw: Builder, name: str, pages: int) -> Tensor:
    """What lay there before, [P, page, Hk, D]."""
    if case.data == "large":
        return draw.arena.place(
            name, torch.zeros(pages, case.page, case.Hk, case.D, dtype=draw.dtype, device=draw.device)
        )
    if case.order == "head":
        return draw.place(name, draw.large_normal(pages, case.Hk, case.page, case.D) * 7).transpose(1, 2)
    return draw.place(name, draw.large_normal(pages, case.page, case.Hk, case.D) * 7)
