"""What a long run found out, one JSON line per cell as it comes, so that a run that was cut short cannot look green.

{"planned": ["suites/...::test[a]", ...]}                               first
{"cell": "suites/...::test[a]", "outcome": "passed", "seconds": 1.2}    one for each cell, at once
{"finished": true}                                                      last

pytest -m multigpu suites --ledger FILE
python -m moe_harness.suites.outcome_log FILE
    exit status 0 only where every planned cell is there and none has failed
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

OUTCOMES = ("passed", "skipped", "failed")


class OutcomeLog:
    """The writing end; whatever was in the file before is gone."""

    def __init__(self, path: Path, planned: Iterable[str]):
        self.file = path.open("w")
        self._write({"planned": list(planned)})

    def add(self, cell: str, outcome: str, seconds: float, why: str = "") -> None:
        """One cell is done."""
        self._write({"cell": cell, "outcome": outcome, "seconds": round(seconds, 3), **({"why": why} if why else {})})

    def finish(self) -> None:
        """Every cell is done."""
        self._write({"finished": True})
        self.file.close()

    def _write(self, entry: dict[str, Any]) -> None:
        self.file.write(json.dumps(entry) + "\n")
        self.file.flush()
        os.fsync(self.file.fileno())


def read(path: Path) -> tuple[Counter, list[str]]:
    """(cells by outcome, what is wrong): failed cells, planned cells that never came, an end that is missing.

    A last line that was cut off is no cell.
    """
    entries = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    planned = [cell for entry in entries for cell in entry.get("planned", ())]
    done = {entry["cell"]: entry for entry in entries if "cell" in entry}
    wrong = [] if planned else ["nothing was planned"]
    wrong += [f"missing: {cell}" for cell in planned if cell not in done]
    wrong += [f"failed: {cell}" for cell, entry in done.items() if entry["outcome"] not in ("passed", "skipped")]
    if not any(entry.get("finished") for entry in entries):
        wrong.append("the run did not come to its end")
    if planned and not any(entry["outcome"] == "passed" for entry in done.values()):
        wrong.append("no cell has passed")
    return Counter(entry["outcome"] for entry in done.values()), wrong


def main(path: Path) -> int:
    """Print what `read` finds; the exit status."""
    outcomes, wrong = read(path)
    print(", ".join(f"{outcomes[name]} {name}" for name in OUTCOMES), *wrong, sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
