"""Three cases of different shapes that kill each fault of the catalogue, as far as there are: docs/breadth.json.

    python -m moe_harness.suites.meta.breadth        about 15 minutes on two idle cores; goes on where it stopped
    python -m moe_harness.suites.meta.breadth matrix.json        from what `moe-harness faults --json matrix.json` found

The case that killed a fault when `first_kills.json` was written comes first, so that this costs a few cases of a fault
where the kill matrix judges hundreds.  A fault of which the file has nothing is judged; delete its entry to have it
judged again.
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from moe_harness.harness.core.catalogue import RANKED, Fault, all_faults
from moe_harness.harness.core.plan import ON_CUDA_ONLY, Request, plan
from moe_harness.harness.process.pool import DEATHS, Pool
from moe_harness.harness.proof import breadth
from moe_harness.harness.proof.kill_matrix import MEMORY_LIMIT, WORLDS
from moe_harness.harness.ranks import judge
from moe_harness.suites.meta.judging import KILLS

FOUND = Path(__file__).resolve().parents[2] / "docs" / "breadth.json"
HANGS = 6.0  # seconds: a hang should cost little


def shown_on_a_cpu() -> Iterator[Fault]:
    """The faults that are looked at: a leak is seen over many calls only, and judged by one case."""
    return (fault for fault in all_faults() if "cpu" in fault.devices)


def cases(fault: Fault) -> list[str]:
    """Ids of the cases of a quick run over all dtypes, the known first kill in front."""
    if fault.stage in RANKED:
        return judge.planned(fault.stage, fault.spec, WORLDS)
    ids = [planned.id for planned in plan(fault.stage, Request()) if planned.check not in ON_CUDA_ONLY]
    known = json.loads(KILLS.read_text()).get(fault.spec)
    return [known, *ids] if known in ids else ids


def killing(ids: list[str], kills: Callable[[str], bool]) -> list[str]:
    """Cases that kill, of up to three shapes."""
    first = next((case_id for case_id in ids if kills(case_id)), None)
    if first is None:
        return []
    found = [first]
    breadth.seek(found, [case_id for case_id in dict.fromkeys(ids) if case_id != first], kills)
    return found


def of_fault(fault: Fault) -> list[str]:
    """As `killing`, judged here."""
    if fault.stage in RANKED:
        return killing(cases(fault), lambda case_id: bool(judge.judge(fault.spec, case_id).findings))
    with Pool(fault.stage, fault.spec, "cpu", 1, HANGS if fault.sign == "process" else 60.0) as pool:
        pool.memory_limit = MEMORY_LIMIT
        declared = pool.start().dtypes
        ids = [case_id for case_id in cases(fault) if _dtype(case_id) in declared]
        return killing(ids, lambda case_id: pool.deaths <= DEATHS and pool.judge_one(case_id).fails)


def _dtype(case_id: str) -> str:
    return breadth.planned(case_id).case.dtype


def of_row(row: dict[str, Any]) -> list[str]:
    """The cases of a row of the kill matrix, one of each of up to three shapes."""
    one_of_each: dict[tuple, str] = {}
    for case_id in row["killing"]:
        one_of_each.setdefault(breadth.planned(case_id).case.shape(), case_id)
    return list(one_of_each.values())[: breadth.WANTED]


def main() -> None:
    found = json.loads(FOUND.read_text()) if FOUND.exists() else {}
    if sys.argv[1:]:
        rows = {row["fault"]: row for path in sys.argv[1:] for row in json.loads(Path(path).read_text())["rows"]}
        found = {f.name: cases for f in shown_on_a_cpu() if f.name in rows and (cases := of_row(rows[f.name]))}
        FOUND.write_text(json.dumps(found, indent=1) + "\n")
    for fault in shown_on_a_cpu():
        if fault.name not in found:
            found[fault.name] = of_fault(fault)
            FOUND.write_text(json.dumps(found, indent=1) + "\n")
            print(f"{breadth.shapes(found[fault.name])}  {fault.stage}  {fault.name}", flush=True)


if __name__ == "__main__":
    main()
