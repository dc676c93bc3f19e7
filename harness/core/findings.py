"""What a check finds, as plain data that crosses from the judging process to the reporting one."""

from dataclasses import asdict, dataclass, field
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


def unfinished(case_id: str, status: str, reason: str) -> dict[str, Any]:
    """A worker's answer for a case that it could not answer itself."""
    return {"id": case_id, "status": status, "reason": reason, "seconds": 0.0, **asdict(Record())}


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
