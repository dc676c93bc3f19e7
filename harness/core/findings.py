"""What a check finds, and all that a judging process says: plain data that crosses to the controlling one."""

from dataclasses import dataclass, field
from typing import Any

HISTOGRAM_EDGES = tuple(i / 4 for i in range(41))  # |z| from 0 to 10 in quarters; the last bin holds all beyond
MAX_Z = 8.92  # harness.core.bounds.max_limit(), here for reports that import no torch; suites/meta compares the two


@dataclass
class Finding:
    """One thing wrong with a result.  `headroom` is the share of the bound used: above 1 it fails."""

    message: str
    headroom: float | None = None
    where: dict[str, Any] = field(default_factory=dict)
    looks_like: list[str] = field(default_factory=list)
    diagnosis: list[dict[str, str]] = field(default_factory=list)
    heatmap: dict[str, Any] | None = None
    about: str = ""  # over many ranks: which of the stage's findings it is


@dataclass
class Record:
    """What one check on one case yielded."""

    findings: list[Finding] = field(default_factory=list)
    worst: float = 0.0  # largest headroom, of failures and passes alike
    elements: int = 0
    histogram: list[int] = field(default_factory=lambda: [0] * len(HISTOGRAM_EDGES))
    observations: dict[str, str] = field(default_factory=dict)
    skipped: str | None = None

    def fail(self, message: str, **fields: Any) -> None:
        self.add(Finding(message, **fields))

    def add(self, finding: Finding) -> None:
        self.findings.append(finding)
        self.worst = max(self.worst, finding.headroom or 0.0)

    def merge(self, other: "Record", note: str = "") -> None:
        """Take over another record's contents; `note` says which part of the check its findings are about."""
        for finding in other.findings:
            finding.message = f"{note}{finding.message}"
        self.findings += other.findings
        self.worst = max(self.worst, other.worst)
        self.elements += other.elements
        self.histogram = [a + b for a, b in zip(self.histogram, other.histogram, strict=True)]
        self.observations |= other.observations


@dataclass
class RankReport:
    """What one rank tells the controller of a case."""

    rank: int
    findings: list[Finding] = field(default_factory=list)
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
        self.findings.append(Finding(message, headroom, place, diagnosis=diagnosis or [], about=check))


@dataclass(frozen=True)
class Loaded:
    """What a judging process says of an implementation that it has loaded."""

    declared: dict[str, Any] = field(default_factory=dict)  # contracts.Declarations, plain
    versions: dict[str, Any] = field(default_factory=dict)
    interpreted: bool = False  # by Triton's interpreter

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Those that it declares."""
        return tuple(self.declared["dtypes"])


@dataclass(frozen=True)
class NotLoaded:
    """Why a judging process could not load an implementation."""

    error: str
    exit_status: int
    traceback: str


@dataclass
class Explanation:
    """Why a case fails: known faults that explain it, best first, what its error looks like, how many are known."""

    diagnosis: list[dict[str, str]] = field(default_factory=list)
    looks_like: list[str] = field(default_factory=list)
    known: int | None = 0  # None: not with all of them was the result compared


@dataclass
class Answer:
    """What a judging process, or many ranks together, say of one case."""

    id: str  # "stage/check/fields", as it was planned
    status: str  # passed, failed, unsupported, skipped, died or error
    reason: str | None = None
    seconds: float = 0.0
    record: Record = field(default_factory=Record)
    judged: str = ""  # the id of the data that judged, `id` where they are the planned ones
    rejected: int = 0  # wrong outputs that these data were proved to reject
    accepted: list[str] = field(default_factory=list)  # those that the planned data would have accepted
    device_lost: bool = False  # a CUDA error has poisoned the process
    lacks: bool = False  # something is not installed here, which other cases need as well
    counts_as: str = ""  # the check in whose name it counts, where not the id's own

    def __post_init__(self) -> None:
        self.judged = self.judged or self.id

    @property
    def findings(self) -> list[Finding]:
        return self.record.findings

    @property
    def fails(self) -> bool:
        return self.status in ("failed", "died")

    @property
    def executed(self) -> bool:
        return self.fails or self.status == "passed"


def restored(answer: dict[str, Any]) -> Answer:
    """An answer that travelled as `dataclasses.asdict` makes it, where only plain data can."""
    record = answer["record"]
    findings = [Finding(**finding) for finding in record["findings"]]
    return Answer(**{**answer, "record": Record(**{**record, "findings": findings})})
