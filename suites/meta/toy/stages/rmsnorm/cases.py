"""Its cases."""

from dataclasses import dataclass
from typing import ClassVar, Self

from moe_harness.harness.core.case import Case
from moe_harness.harness.core.plan import Request


@dataclass(frozen=True, kw_only=True)
class RmsNormCase(Case):
    stage: ClassVar[str] = "rmsnorm"
    T: int = 7
    H: int = 48

    def rows(self) -> int:
        return self.T

    def resized(self) -> Self:
        return self.but(T=2 * self.T + 1, H=self.H + 8, seed=self.seed + 1)


CaseType = RmsNormCase


def plan(request: Request) -> dict[str, list[Case]]:
    shapes = [RmsNormCase(T=t, H=h, dtype=d) for t in (1, 5, 40) for h in (16, 33) for d in request.dtypes]
    return {
        "contract": [RmsNormCase(T=0), RmsNormCase(variant="defaults")],
        "numeric": shapes,
        "layouts": [RmsNormCase(layout=f"x:{kind}") for kind in ("padded", "strided", "transposed")],
        "memory": shapes[:3],
        "determinism": shapes[:3],
        "laws": [RmsNormCase(variant="scale_invariance", dtype=d) for d in request.dtypes],
    }
