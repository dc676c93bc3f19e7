"""What one rank reports of a case: findings as plain data, a refusal, and what was observed."""

from dataclasses import asdict, dataclass, field
from hashlib import sha1
from typing import Any

from torch import Tensor


@dataclass
class RankReport:
    """Collected on one rank; crosses to the controller as a dict."""

    rank: int
    findings: list[dict[str, Any]] = field(default_factory=list)
    rejected: str | None = None
    observed: dict[str, Any] = field(default_factory=dict)

    def fail(
        self,
        check: str,
        message: str,
        *,
        headroom: float | None = None,
        where: dict[str, Any] | None = None,
        diagnosis: list[dict[str, str]] | None = None,
    ) -> None:
        place = {"rank": self.rank} if where is None else where
        finding = {"check": check, "message": message, "headroom": headroom, "where": place}
        self.findings.append({**finding, "diagnosis": diagnosis or []})

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def digest(result: Tensor) -> str:
    """A name of the values of a result: equal results, whatever their dtype and layout, have the same one."""
    values = result.detach().cpu().double().nan_to_num(nan=1e300) + 0.0  # one zero, one NaN
    return sha1(values.contiguous().numpy().tobytes()).hexdigest()


def differing_rows(got: Tensor, expected: Tensor) -> Tensor:
    """Indices of the rows that differ anywhere; NaN equals NaN, which is right only where it is expected."""
    same = (got == expected) | (got.isnan() & expected.isnan())
    return (~same).any(1).nonzero().flatten()
