"""The score of a run: as text, as JSON, and as the line of docs/catalogue.md.

`python -m moe_harness.suites.mutation.report` writes that line from docs/mutation.json.
"""

import json
import platform
import re
import shlex
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from scipy.stats import binomtest

ROOT = Path(__file__).resolve().parents[2]
PAGE, RESULT = ROOT / "docs/catalogue.md", ROOT / "docs" / "mutation.json"
LINE = re.compile(r"`tox -e mutation` makes .*?mutation\.json\)\)\.", re.DOTALL)
OUTCOMES = ("killed", "survived", "timeout", "error")
PACKAGES = ("cosmic-ray", "torch", "pytest", "hypothesis")


@dataclass(frozen=True)
class Row:
    """One edit: where, which, and killed, survived, timeout or error (it could not be tried)."""

    module: str
    line: int
    operator: str
    outcome: str
    diff: str
    definition: str


@dataclass(frozen=True)
class Report:
    """What a run found.  Only `killed` counts as noticed: a run that was stopped may have been slow."""

    command: str
    commit: str
    versions: dict[str, str]
    seed: int
    mutants: int  # of which the sample was drawn
    workers: int
    seconds: int
    counts: dict[str, int]
    score: float  # noticed, of those tried
    interval: tuple[float, float]  # Wilson, 95 %
    modules: dict[str, dict[str, int]] = field(default_factory=dict)
    unnoticed: list[dict[str, object]] = field(default_factory=list)  # with diff, whatever was not killed

    @classmethod
    def of(cls, rows: list[Row], *, seed: int, mutants: int, workers: int, seconds: int) -> "Report":
        """Count the rows, each of which is one edit tried."""
        counts = Counter(row.outcome for row in rows)
        tried = len(rows) - counts["error"]
        interval = binomtest(counts["killed"], tried).proportion_ci(0.95, "wilson")
        modules: dict[str, Counter[str]] = {}
        for row in sorted(rows, key=lambda row: row.module):
            modules.setdefault(row.module, Counter())[row.outcome] += 1
        return cls(
            command=shlex.join(["python", "-m", "moe_harness.suites.mutation.run", *sys.argv[1:]]),
            commit=commit(),
            versions={"python": platform.python_version(), **installed()},
            seed=seed, mutants=mutants, workers=workers, seconds=seconds,
            counts={name: counts[name] for name in OUTCOMES},
            score=round(counts["killed"] / tried, 4),
            interval=(round(interval.low, 4), round(interval.high, 4)),
            modules={module: dict(found) for module, found in modules.items()},
            unnoticed=[asdict(row) for row in rows if row.outcome != "killed"],
        )  # fmt: skip

    def dumps(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    def text(self) -> str:
        """What was not noticed, with its diff; a table of the modules; the score."""
        lines = []
        for row in self.unnoticed:
            lines += [f"{row['outcome']} {row['module']}:{row['line']} {row['definition']}", str(row["diff"]), ""]
        lines += [f"{'module':40}" + "".join(f"{name:>10}" for name in OUTCOMES)]
        lines += [f"{m:40}" + "".join(f"{c.get(n, 0):10}" for n in OUTCOMES) for m, c in self.modules.items()]
        counted = ", ".join(f"{count} {name}" for name, count in self.counts.items())
        low, high = self.interval
        told = (
            f"noticed: {self.score:.1%} (95 % interval {low:.1%} to {high:.1%}) of a sample of "
            f"{sum(self.counts.values())} of {self.mutants} edits, seed {self.seed}: {counted}; "
            f"{self.seconds} s with {self.workers} workers"
        )
        return "\n".join([*lines, "", told])


def installed() -> dict[str, str]:
    """Versions of the packages that matter, of those that are installed."""
    found = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def commit() -> str:
    """The commit that was tried, marked where files differ from it."""
    done = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def readme_line(result: Path = RESULT) -> str:
    """The sentence of docs/catalogue.md."""
    found = json.loads(result.read_text())
    low, high = (f"{100 * bound:.0f}" for bound in found["interval"])
    return (
        "`tox -e mutation` makes small edits of `reference/` and `harness/`, one at a time. Of a random sample of "
        f"{sum(found['counts'].values())}\n(there are {found['mutants']:,}) the suites of the edited module noticed "
        f"{100 * found['score']:.0f} % (95 % interval {low} to {high}; [the others](mutation.json))."
    )


def rewritten(text: str) -> str:
    """The page with its line as the result has it."""
    return LINE.sub(lambda _: readme_line(), text)


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text()))
