"""Cases of the stage `model`: a tiny checkpoint of a family, and what is asked of the loaded model.

`variant` is "logits" (model(input_ids)), "layers" (every model.layer(i) alone, on the reference's residual stream),
"tokens" (greedy model.generate of prompts of several lengths together), or what generate promises else (SERVED).
Over ranks there is "drawn" too, where every rank has to draw the same tokens.

model/over_ranks/variant=logits,R=2,ep=1        two ranks that hold whole experts
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

from moe_harness.harness.core.case import Case
from moe_harness.harness.core.plan import Planned, Request

FAMILIES = ("qwen3_moe", "qwen2_moe", "qwen3")
# Latent attention without and with a low rank of queries and groups of experts; a gated shared expert beside norms of
# queries and keys; linear attention.  What they share with FAMILIES is judged there, so that fewer cases are enough.
FURTHER = ("deepseek_v2_lite", "deepseek_v2", "qwen3_omni_moe_talker_text", "qwen3_next")
LENGTHS = (1, 2, 15, 16, 17, 33)  # around pages of 16 and chunks
CROSSED = (64, 256)  # pages of other engines, which the tokens of a prompt a little shorter go beyond
SERVED = ("counts", "stops", "again", "temperature")


@dataclass(frozen=True, kw_only=True)
class ModelCase(Case):
    stage: ClassVar[str] = "model"
    family: str = "qwen3_moe"
    B: int = 4
    L: int = 9
    new: int = 0  # tokens to generate
    tied: bool = False
    renormalize: bool = True
    theta: float = 10000.0
    shards: int = 2
    R: int = 1  # ranks; over_ranks asks one of them too
    ep: bool = False  # expert_parallel
    twins: bool = False  # experts come in pairs of equal logits and weights, and an odd number of them is chosen

    def rows(self) -> int:
        return self.B * (self.L + self.new)

    def once(self) -> Self:
        """`variant` is what is asked of the model."""
        return self.but(optional=False)

    def resized(self) -> Self:
        return self.but(L=self.L + 1, seed=self.seed + 1)

    def core(self) -> bool:
        """Layers are optional in the contract; families and how long prompts may be are the implementation's choice."""
        ordinary = self.variant in ("logits", "tokens") and min(CROSSED) >= self.L
        return super().core() and ordinary and self.family == "qwen3_moe"

    def part(self) -> str:
        """Either way of sharing the experts may be refused."""
        return f"{self.dtype}, {'whole' if self.ep else 'cut'} experts"


CaseType = ModelCase


def plan(request: Request) -> dict[str, Iterable[Case]]:
    """Cases of every check, in the order in which they are judged."""
    return {
        "contract": _contract(request),
        "numeric": _numeric(request),
        "special": _special(request),
        "determinism": [ModelCase(variant="logits", dtype=request.dtypes[-1])],
    }


def _contract(request: Request) -> Iterator[Case]:
    for dtype in request.dtypes:
        yield ModelCase(variant="logits", B=1, L=1, dtype=dtype)
        yield ModelCase(variant="tokens", B=1, L=1, new=1, dtype=dtype)
    yield ModelCase(variant="counts", B=5, L=6, new=7, dtype=request.dtypes[0])
    yield ModelCase(variant="stops", B=6, L=6, new=6, dtype=request.dtypes[0])
    yield ModelCase(variant="temperature", B=16, L=4, new=1, dtype=request.dtypes[-1])


def _numeric(request: Request) -> Iterator[Case]:
    for family in FAMILIES:
        for dtype in request.dtypes:
            yield ModelCase(variant="layers", family=family, dtype=dtype, optional=True)
            yield ModelCase(variant="logits", family=family, dtype=dtype)
            yield ModelCase(variant="tokens", family=family, dtype=dtype, B=5, new=8)
    for length in request.pick(LENGTHS, (*LENGTHS, 31, 32, 64, 127, 129)):
        dtype = request.dtypes[length % len(request.dtypes)]
        yield ModelCase(variant="logits", B=2, L=length, dtype=dtype)
        yield ModelCase(variant="tokens", B=6, L=length, new=request.pick(6, 20), dtype=dtype)
    yield ModelCase(variant="tokens", B=request.pick(20, 40), L=5, new=3, dtype=request.dtypes[0])
    for length in (16, 33):  # whole pages of 16, and one token more than that
        yield ModelCase(variant="again", B=6, L=length, new=5, dtype=request.dtypes[0])
    for edge in CROSSED:
        yield ModelCase(variant="tokens", B=1, L=edge - 2, new=5, dtype=request.dtypes[0])
    yield ModelCase(variant="logits", B=1, L=CROSSED[-1] + 1, dtype=request.dtypes[0])
    for place, family in enumerate(FURTHER):
        for dtype in request.dtypes:
            yield ModelCase(variant="layers", family=family, dtype=dtype, optional=True)
        dtype = request.dtypes[place % len(request.dtypes)]
        yield ModelCase(variant="logits", family=family, B=2, L=33, dtype=dtype)
        yield ModelCase(variant="tokens", family=family, L=17, new=4, dtype=dtype)


def _special(request: Request) -> Iterator[Case]:
    """What configs and checkpoints vary."""
    for dtype in request.dtypes[:1] + request.dtypes[-1:]:
        yield ModelCase(variant="logits", tied=True, dtype=dtype)
        yield ModelCase(variant="logits", renormalize=False, dtype=dtype)
        yield ModelCase(variant="logits", theta=1e6, L=30, B=2, dtype=dtype)
        yield ModelCase(variant="logits", shards=1, dtype=dtype)
        yield ModelCase(variant="logits", family="qwen3", tied=True, shards=5, dtype=dtype)


def plan_over_ranks(worlds: Sequence[int], *, profile: str = "quick", seed: int = 0) -> Iterator[Planned]:
    """Teacher-forced, then end to end: every rank alike, with experts cut and whole, one prompt and several.

    Dense layers and shared experts have sums of their own; they come after what every implementation is for.
    """
    for ranks in worlds:
        for ep in (False, True):
            for seed_of, case in enumerate(_of_world(profile), start=seed):  # whole experts get the checkpoints of cut
                if not ep or case.family != "qwen3":
                    yield Planned("over_ranks", case.but(R=ranks, ep=ep, seed=seed_of))


def _of_world(profile: str) -> Iterator[ModelCase]:
    yield ModelCase(variant="logits", B=1, L=5)
    yield ModelCase(variant="logits", B=3, L=5)
    yield ModelCase(variant="logits", B=3, L=5, dtype="bf16")
    yield ModelCase(variant="logits", B=3, L=5, twins=True)  # either twin is right, if all ranks choose the same
    yield ModelCase(variant="tokens", B=3, L=5, new=5)
    yield ModelCase(variant="drawn", B=3, L=5, new=5, dtype="bf16")
    for place, family in enumerate(("qwen2_moe", "qwen3", *(FURTHER if profile != "quick" else ()))):
        yield ModelCase(variant="logits", family=family, B=3, L=5, dtype=("fp32", "bf16")[place % 2])
        yield ModelCase(variant="tokens", family=family, B=3, L=5, new=4)
