"""Cases of the stage `moe_block`: one layer of each model family."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import cycle
from typing import Any, ClassVar, Self

from moe_harness.harness.core import boundaries as at
from moe_harness.harness.core.case import Case, crossed, in_shapes, layouts
from moe_harness.harness.core.plan import Request, on_cuda

FAMILIES = (
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_next",
    "qwen3_omni_moe_talker_text",
    "mixtral",
    "deepseek_v2",
    "deepseek_v3",
)
# Where a part of a block takes another path: many experts, counts that no tile divides, one slot, all experts, square
# weights, short and long sums.
SHAPES: tuple[dict[str, Any], ...] = (
    {"family": "qwen3_next", "T": 3, "E": 512, "k": 10, "H": 32, "I": 16},
    {"family": "qwen2_moe", "T": 9, "E": 6, "k": 2, "renorm": "no"},
    {"T": 9, "k": 1, "renorm": "no"},
    {"T": 9, "E": 4, "k": 4, "H": 48, "I": 48},
    {"family": "qwen2_moe", "T": 9, "E": 4, "k": 2, "H": 1025, "I": 16},
    {"family": "deepseek_v2", "T": 33, "k": 6, "method": "greedy"},
)
MORE_SHAPES: tuple[dict[str, Any], ...] = (
    {"T": 7, "H": 32, "I": 16, "E": 8, "k": 2},
    {"T": 19, "H": 96, "E": 32, "k": 6},
)
LAWS = ("token_permutation", "batch_split", "row_alone")
CANCELLING = ("partial_sums", "deep_sums")  # data of which all experts are chosen alike, and whose sums cancel


@dataclass(frozen=True, kw_only=True)
class MoeBlockCase(Case):
    stage: ClassVar[str] = "moe_block"
    family: str = "qwen3_moe"
    T: int = 16
    H: int = 64
    I: int = 32  # noqa: E741 - the field's own letter
    shared: int = 48  # intermediate size of the shared expert, where the family has one
    E: int = 16
    k: int = 4
    renorm: str = "yes"  # norm_topk_prob: yes, no, or default, where the key is absent
    method: str = "groups"  # topk_method of DeepSeek-V2: by groups, or greedy, whatever n_group says
    best: int = 0  # topk_group of DeepSeek; 0: half of the groups
    scale: float = 0.0  # routed_scaling_factor of DeepSeek; 0: that of the family's largest model
    act: str = "silu"  # hidden_act

    def rows(self) -> int:
        return self.T * self.k

    def part(self) -> str:
        return self.family

    def core(self) -> bool:
        """All released models of these families have silu."""
        return super().core() and self.act == "silu"

    def resized(self) -> Self:
        return self.but(T=2 * self.T + 1, H=self.H + 8, I=self.I + 8, seed=self.seed + 1)


CaseType = MoeBlockCase


def plan(request: Request) -> dict[str, Iterable[Case]]:
    """Cases of every check, in the order in which they are judged."""
    return {
        "contract": _contract(request),
        "numeric": _numeric(request),
        "layouts": _layouts(request),
        "memory": [*_small(request), *(MoeBlockCase(dtype=request.dtypes[0], **shape) for shape in MORE_SHAPES)],
        "special": [*in_shapes(_special(request), *MORE_SHAPES), *_partial_sums(request), *_deep_sums(request)],
        "laws": _laws(request),
        "determinism": _small(request),
        "batch_invariance": _small(request),
        "leak": [MoeBlockCase(T=64, H=256, E=4, k=2, dtype=request.dtypes[0])],
        **on_cuda(_small(request)),
    }


def _contract(request: Request) -> Iterator[Case]:
    for family in FAMILIES:
        yield MoeBlockCase(family=family, dtype=request.dtypes[0])
        yield MoeBlockCase(family=family, T=0, dtype=request.dtypes[-1])
    for family, width in (("qwen3_moe", 32), ("qwen2_moe", 40)):
        yield MoeBlockCase(family=family, T=0, H=width, I=16, shared=16, E=8, k=2, dtype=request.dtypes[0])


def _numeric(request: Request) -> Iterator[Case]:
    single: Iterator[dict[str, Any]] = cycle(
        ({"H": 128, "I": 64}, {"H": 96, "I": 80}, {"H": 72, "I": 48}, {"H": 160, "I": 40})
    )
    for family in FAMILIES:
        for dtype in request.dtypes:
            for renorm in ("yes", "no"):
                yield MoeBlockCase(family=family, T=33, renorm=renorm, dtype=dtype)
            # The contract names the key, so who needs it may refuse; who guesses has to guess the class's default.
            yield MoeBlockCase(family=family, T=33, renorm="default", dtype=dtype, optional=True)
            yield MoeBlockCase(family=family, T=5, E=64, k=6, H=96, I=40, shared=70, dtype=dtype)
            yield MoeBlockCase(family=family, T=1, E=8, k=2, dtype=dtype, **next(single))
        for tokens in request.pick((2, 3, 4, 65, 257), at.TOKENS[1:]):
            yield MoeBlockCase(family=family, T=tokens, dtype=request.dtypes[-1], H=33, I=17, shared=9)
    for experts, top_k in request.pick(((128, 8),), at.RELEASED_EXPERTS):
        yield MoeBlockCase(T=17, E=experts, k=top_k, dtype=request.dtypes[-1])
    for dtype in request.dtypes:
        for shape in SHAPES:
            yield MoeBlockCase(**shape, dtype=dtype)
    yield from _turning(request)


def _turning(request: Request) -> Iterator[Case]:
    """Sizes at which published blocks turned wrong: routers on either side of a threshold, one slot, many experts."""
    dtypes, turning = cycle(request.dtypes), cycle(at.TOKENS_TURNING[2:])
    for family in FAMILIES:
        few = (1, 2, 4, 8) if family.startswith("deepseek") else ()  # a router in fp32: 16 bits choose otherwise
        for tokens in (*few, 16, 17, 127, 128, 129):
            yield MoeBlockCase(family=family, T=tokens, E=64, k=6, H=32, I=16, shared=16, dtype=request.dtypes[-1])
        one: dict[str, Any] = {"k": 1, "renorm": "no", "H": 48, "I": 24, "shared": 24}
        yield from crossed(MoeBlockCase, family=family, dtype=request.dtypes, T=(3, 18), **one)
        yield MoeBlockCase(family=family, T=next(turning), H=16, I=16, shared=16, dtype=next(dtypes))
    for experts, top_k in at.LARGE_K:
        for family in ("qwen3_moe", "deepseek_v3"):
            if family == "qwen3_moe" or 2 * top_k <= experts:  # half of the groups can be chosen from
                yield MoeBlockCase(family=family, T=9, E=experts, k=top_k, H=32, I=16, shared=16, dtype=next(dtypes))
    for experts in at.EXPERTS_MANY:
        yield MoeBlockCase(T=9, E=experts, k=8, H=16, I=8, dtype=next(dtypes))
    for family, width in zip(("qwen3_moe", "qwen2_moe", "mixtral", "deepseek_v3"), at.WIDTHS_BEYOND_4096, strict=True):
        yield MoeBlockCase(family=family, T=5, E=8, k=2, H=width, I=8, shared=8, dtype=next(dtypes))
    for family in FAMILIES:
        for tokens, width in ((1, 64), (19, 40), (65, 33)):
            fields: dict[str, Any] = {"H": width, "I": 24, "shared": 17, "dtype": next(dtypes)}
            yield MoeBlockCase(family=family, T=tokens, variant="poisoned", **fields)
    for family in FAMILIES:  # a third shape of one slot, beside which the shared expert stands
        yield MoeBlockCase(family=family, T=7, k=1, renorm="no", H=40, I=16, shared=32, dtype=next(dtypes))
    for family in ("qwen2_moe", "qwen3_moe", "deepseek_v2"):
        yield MoeBlockCase(family=family, T=7, E=256, k=8, H=32, I=16, shared=16, dtype=next(dtypes))
    yield from _once_more(request)


def _once_more(request: Request) -> Iterator[Case]:
    """Conditions that one shape above meets, in two others."""
    for tokens, width in ((3, 32), (40, 48)):
        small: dict[str, Any] = {"T": tokens, "H": width, "I": 16, "shared": 16}
        default: dict[str, Any] = {"family": "qwen3_next", "renorm": "default", "optional": True}
        yield from crossed(MoeBlockCase, dtype=request.dtypes, **default, **small)
        yield MoeBlockCase(E=128, k=8, dtype=request.dtypes[-1], **small)
        for experts, top_k in ((12, 3), (24, 5)):
            yield from crossed(MoeBlockCase, family="qwen2_moe", E=experts, k=top_k, renorm=("yes", "no"), **small)
        yield MoeBlockCase(E=6, k=6, **small | {"H": 2 * width})
    for tokens, width in ((5, 1531), (12, 2047)):  # long sums, and an odd width
        sizes: dict[str, Any] = {"T": tokens, "H": width, "I": 16, "E": 5, "k": 3, "shared": 16}
        yield from crossed(MoeBlockCase, family="qwen2_moe", dtype=request.dtypes, **sizes)
    yield from _other_configs(request)


def _other_configs(request: Request) -> Iterator[Case]:
    """Values that a key of the config has in one model of a family and not in another."""
    dtypes = cycle(request.dtypes)
    for place, (tokens, width) in enumerate(((5, 32), (13, 48), (20, 24))):
        small: dict[str, Any] = {"T": tokens, "H": width, "I": 16, "shared": 16}
        for family, scale, best in (("deepseek_v2", 16.0, 3), ("deepseek_v3", 1.5, 2), ("deepseek_v3", 2.827, 1)):
            yield MoeBlockCase(family=family, E=64, k=6, scale=scale, best=best, dtype=next(dtypes), **small)
        yield MoeBlockCase(family="deepseek_v2", method="greedy", scale=1.0, dtype=next(dtypes), **small)
        for family in FAMILIES[place::3]:
            yield MoeBlockCase(family=family, act="gelu_pytorch_tanh", dtype=next(dtypes), **small)
    for family, width in (("qwen3_moe", 32), ("qwen2_moe", 40)):  # matrices whose transpose fits
        yield MoeBlockCase(family=family, T=12, H=width, I=width, shared=16, E=8, k=2, dtype=next(dtypes))


def _layouts(request: Request) -> Iterator[Case]:
    operands = (
        "hidden_states",
        "gate.weight",
        "experts.gate_up_proj",
        "experts.down_proj",
        "shared_expert_gate.weight",
    )
    qwen: dict[str, Any] = {"family": "qwen2_moe", "T": 13, "dtype": request.dtypes[-1]}
    yield from crossed(MoeBlockCase, layout=layouts(operands, at.LAYOUTS[:5]), H=37, I=21, **qwen)
    for inner in (32, 16):  # I == H, 2I == H
        yield from crossed(MoeBlockCase, layout=layouts((*operands[:4], "all"), at.LAYOUTS[:5]), H=32, I=inner, **qwen)
    for sizes in ({"I": 1}, {"T": 1}, {"shared": 1}, {"E": 1, "k": 1}):
        for kind in ("unit", "padded", "strided"):
            shape: dict[str, Any] = {"T": 13, "H": 24, "I": 16, "E": 8, "k": 2} | sizes
            yield MoeBlockCase(family="qwen2_moe", layout=f"all:{kind}", dtype=request.dtypes[-1], **shape)


def _small(request: Request) -> Iterator[Case]:
    families = request.pick(("qwen3_moe", "qwen2_moe", "deepseek_v3"), FAMILIES)
    return crossed(MoeBlockCase, family=families, T=13, dtype=request.dtypes)


def _special(request: Request) -> Iterator[Case]:
    data = ("token_nan", "token_inf", "tiny")
    return crossed(MoeBlockCase, family=FAMILIES, T=12, data=data, dtype=request.dtypes[-1])


def _partial_sums(request: Request) -> Iterator[Case]:
    for family, tokens, width, inner, top_k in (
        ("qwen3_moe", 17, 48, 24, 4), ("mixtral", 9, 64, 32, 8), ("qwen2_moe", 33, 40, 16, 4),
        ("mixtral", 5, 32, 48, 4), ("deepseek_v2", 12, 96, 24, 8),
    ):  # fmt: skip
        shape: dict[str, Any] = {"T": tokens, "H": width, "I": inner, "shared": 16, "E": top_k, "k": top_k}
        for dtype in request.narrow():
            yield MoeBlockCase(family=family, method="greedy", data="partial_sums", dtype=dtype, **shape)


def _deep_sums(request: Request) -> Iterator[Case]:
    for family, tokens, width, inner, top_k in (
        ("qwen3_moe", 17, 136, 48, 4), ("mixtral", 9, 64, 264, 8), ("qwen2_moe", 3, 1040, 24, 4),
    ):  # fmt: skip
        shape: dict[str, Any] = {"T": tokens, "H": width, "I": inner, "shared": 16, "E": top_k, "k": top_k}
        for dtype in request.narrow():
            yield MoeBlockCase(family=family, method="greedy", data="deep_sums", dtype=dtype, **shape)


def _laws(request: Request) -> Iterator[Case]:
    return crossed(MoeBlockCase, variant=LAWS, family=FAMILIES, T=14, dtype=request.dtypes[-1])
