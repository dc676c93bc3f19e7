"""Helpers of the meta suites: strangers' files, and judging until the first kill."""

import ast
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

from moe_harness.harness.core import contracts
from moe_harness.harness.core.plan import ON_CUDA_ONLY, plan
from moe_harness.harness.core.request import Request
from moe_harness.harness.process.pool import Pool, prepare

FOLDER = Path(__file__).parent


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


def first_kill(stage: str, spec: str, timeout: float = 20.0) -> dict[str, Any] | None:
    """The first failing answer of the quick profile on the CPU, or None where the implementation survives."""
    prepare()
    with Pool(stage, spec, "cpu", 1, timeout) as pool:
        declared = pool.start()["declared"]
        request = Request(dtypes=tuple(declared["dtypes"]))
        for answer in pool.judge(_in_turn(stage, request)):
            assert answer["status"] != "error", answer["reason"]
            if answer["status"] in ("failed", "died"):
                return answer
    return None


def _in_turn(stage: str, request: Request) -> list[str]:
    """The plan, a case of each check in turn: most mistakes show in many cases of one of them."""
    by_check: dict[str, list[str]] = {}
    for planned in plan(stage, request):
        if planned.check not in ON_CUDA_ONLY:
            by_check.setdefault(planned.check, []).append(planned.id)
    return [case for turn in zip_longest(*by_check.values()) for case in turn if case is not None]
