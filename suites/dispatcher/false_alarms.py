"""Count false alarms over many ranks: right dispatchers and layers on random cases of worlds 1, 2 and 4.

    python -m moe_harness.suites.dispatcher.false_alarms --cases 10000 --json docs/false_alarms_ranks.json

Case n follows from the seed and n alone, and what the file holds is not judged again: a run that is interrupted goes on
where it stopped.  With n cases and no alarm the rate is below 3 / n at 95 % confidence.
"""

import argparse
import json
import random
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

from moe_harness.harness.core.plan import Planned
from moe_harness.harness.core.ranked_cases import DTYPES
from moe_harness.harness.ranks import judge
from moe_harness.harness.stages.dispatcher import cases
from moe_harness.harness.stages.dispatcher.ranked import RANKED
from moe_harness.harness.stages.parallel_linear.cases import LinearCase
from moe_harness.harness.stages.reduction import cases as reduction_cases
from moe_harness.suites.dispatcher.subjects import REGISTERED

WORLDS = (1, 2, 4)
STRANGERS = Path(__file__).with_name("strangers") / "right.py"
UNUSUAL = STRANGERS.with_name("unusual.py")
DISPATCHERS = (
    *REGISTERED,
    *(f"{STRANGERS}:{name}" for name in ("Padded", "Pickled", "Letters", "Overlapped", "Wide", "OneAtATime", "Same")),
    *(
        f"{UNUSUAL}:{name}"
        for name in ("Functional", "Method", "Threaded", "Defaults", "Silent", "Mesh", "NumpySplits")
    ),
)
REDUCTIONS = ("parallel", "moe_harness.harness.stages.reduction.faults.reductions:finish")
LINEARS = {
    "replicated": ("parallel:Replicated", f"{STRANGERS}:MyReplicatedLinear"),
    "column": ("parallel:ColumnParallel", f"{STRANGERS}:MyColumnParallel"),
    "merged_column": ("parallel:MergedColumnParallel", f"{STRANGERS}:GateUpMergedColumn"),
    "row": ("parallel:RowParallel", f"{STRANGERS}:RowSharded"),
}
IMPLEMENTATIONS = len(DISPATCHERS) + len(REDUCTIONS) + sum(map(len, LINEARS.values()))


def drawn(rng: random.Random) -> tuple[str, str]:
    """(implementation, case id); one case in five is a layer, one in ten a reduction."""
    kind_of_case = rng.random()
    if kind_of_case < 0.7:
        impl, check = rng.choice(DISPATCHERS), rng.choice(RANKED.checks)
        return impl, Planned(check, cases.draw(rng, WORLDS, copies=impl in REGISTERED)).id
    if kind_of_case < 0.8:
        planned = list(reduction_cases.plan([rng.choice(WORLDS)]))
        check, reduction = rng.choice(planned)
        return rng.choice(REDUCTIONS), Planned(check, reduction.but(seed=rng.randrange(10**6))).id
    ranks, experts, kind = rng.choice(WORLDS), rng.randint(1, 5), rng.choice(list(LINEARS))
    case = LinearCase(
        R=ranks,
        E=experts,
        K=ranks * rng.randint(1, 9),
        N=ranks * rng.randint(1, 9),
        S="+".join(str(rng.choice([0, 0, 1, 2, 5, 16])) for _ in range(experts)),
        kind=kind,
        dtype=rng.choice(DTYPES),
        seed=rng.randrange(10**6),
    )
    return rng.choice(LINEARS[kind]), Planned("shard", case).id


def main() -> None:
    parser = argparse.ArgumentParser(description="False alarms over many ranks.")
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, required=True, help="Written every 100 cases; what it holds is kept.")
    given = parser.parse_args()
    found = known(given.json, given.seed)
    counts, start = Counter(found["outcomes"]), time.monotonic()
    for number in range(found["cases"], given.cases):
        spec, case = drawn(random.Random(f"{given.seed}/{number}"))
        verdict = judge.judge(spec, case)
        outcome = "failed" if verdict.findings else "refused" if verdict.unsupported else "passed"
        counts[f"{case.split('/')[0]} {outcome}"] += 1
        found["alarms"] += [{"impl": spec, "case": case, "told": f["message"]} for f in verdict.findings]
        found |= {"cases": number + 1, "outcomes": dict(sorted(counts.items()))}
        if number % 100 == 99 or number + 1 == given.cases:
            text = json.dumps(found, indent=1).replace(str(STRANGERS.parent), "suites/dispatcher/strangers")
            given.json.write_text(text + "\n")
            print(f"{number + 1} cases, {time.monotonic() - start:.0f} s, {len(found['alarms'])} alarms", flush=True)


def known(path: Path, seed: int) -> dict[str, Any]:
    """What an earlier run with this seed left at `path`, to go on from; nothing judged where there is none."""
    command = f"python -m moe_harness.suites.dispatcher.false_alarms --seed {seed} --json {path}"
    found = {"command": command, "torch": version("torch"), "worlds": WORLDS, "implementations": IMPLEMENTATIONS,
             "cases": 0, "outcomes": {}, "alarms": []}  # fmt: skip
    earlier = json.loads(path.read_text()) if path.exists() else {}
    return found | (earlier if earlier.get("command") == command else {})


if __name__ == "__main__":
    main()
