"""Helpers of the meta suites: strangers' files, and judging until the first kill."""

import ast
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import zip_longest
from pathlib import Path

from moe_harness.harness.core import contracts
from moe_harness.harness.core.catalogue import all_faults
from moe_harness.harness.core.findings import Answer
from moe_harness.harness.core.plan import ON_CUDA_ONLY, Request, plan
from moe_harness.harness.process.pool import Pool

FOLDER = Path(__file__).parent
KILLS = FOLDER / "first_kills.json"


def functions_of(folder: str) -> Iterator[tuple[str, str]]:
    """(stage, spec) of every public function in a folder of strangers' files that the contract's call binds to."""
    for file in sorted((FOLDER / folder).glob("*.py")):
        stage = next((s for s in contracts.STAGES if file.stem.startswith(s)), None)
        for node in ast.parse(file.read_text()).body if stage else ():
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and _fits(stage, node):
                yield stage, f"{file}:{node.name}"


def _fits(stage: str, node: ast.FunctionDef) -> bool:
    """Whether the contract's call binds: as many positional arguments, under whatever names, and its keywords only.

    One that passes on what it does not name (`*call, **options`) has to name fewer than there are.
    """
    parameters = contracts.SIGNATURES[stage].parameters.values()
    positional = [p for p in parameters if p.kind is not p.KEYWORD_ONLY]
    keywords = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    if node.args.vararg and node.args.kwarg:
        return 0 < len(node.args.args) < len(positional)
    taken = {a.arg for a in node.args.kwonlyargs}
    return len(node.args.args) == len(positional) and taken <= keywords and bool(taken) == bool(keywords)


def first_kill(stage: str, spec: str, timeout: float = 20.0) -> Answer | None:
    """A failing answer of the quick profile on the CPU, or None where the implementation survives all of it.

    The case that killed it when `first_kills.json` was written comes first, as long as it is planned.
    """
    with Pool(stage, spec, "cpu", 1, timeout) as pool:
        dtypes = pool.start().dtypes
        ids = _in_turn(stage, Request(dtypes=dtypes))
        known = _known().get(_key(spec))
        for answer in pool.judge([known, *ids] if known in ids else ids):
            assert answer.status != "error", answer.reason
            if answer.fails:
                return answer
    return None


def _in_turn(stage: str, request: Request) -> list[str]:
    """The plan, a case of each check in turn: most mistakes show in many cases of one of them."""
    by_check: dict[str, list[str]] = {}
    for planned in plan(stage, request):
        if planned.check not in ON_CUDA_ONLY:
            by_check.setdefault(planned.check, []).append(planned.id)
    return [case for turn in zip_longest(*by_check.values()) for case in turn if case is not None]


def _key(spec: str) -> str:
    """A spec without the place of this tree."""
    return spec.removeprefix(f"{FOLDER}/")


@cache
def _known() -> dict[str, str]:
    return json.loads(KILLS.read_text()) if KILLS.exists() else {}


def main() -> None:
    """Write `first_kills.json` anew: for every wrong implementation that shows on a CPU the case that kills it.

    python -m moe_harness.suites.meta.judging           about 10 minutes on two cores
    """
    faults = [f for f in all_faults() if f.stage in contracts.SIGNATURES and "cpu" in f.devices and f.part is None]
    wrong = [*functions_of("wrong"), *((fault.stage, fault.spec) for fault in faults)]
    found: dict[str, str] = {}

    def note(one: tuple[str, str]) -> None:
        answer = first_kill(*one, timeout=20.0)
        if answer is not None:
            found[_key(one[1])] = answer.id

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(note, wrong))
    KILLS.write_text(json.dumps(found, indent=0, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
