"""Which suites judge an edit of which module: of its own stem first, then the tests of the judge that go through it.

Each entry is the arguments of one pytest run.  Runs follow one another, likeliest killer first, until one fails.  All
of them together take about a minute on an idle core, since that is what every edit costs that nobody notices; what the
rest of the suites would notice besides is not counted.
"""

from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[2]

META, RANKED, LINEAR = "suites/meta/test_", "suites/dispatcher/test_", "suites/parallel_linear"
PLANS = f"{META}rounding.py {META}cases.py {META}power.py"
FAULTS = f"{META}catalogue.py {META}published.py"
ALL_STAGES = "suites/router suites/grouped_linear suites/shared_expert_gate suites/experts suites/moe_block"
CLI = f"{META}cli.py -k 'not ctrl_c'"
ISOLATION = f"{META}isolation.py -k 'not floods and not hangs'"
DIAGNOSIS_RANKED = f"{META}diagnosis_ranked.py"

STAGE = ("suites/{stem}", f"{PLANS} -k {{stem}}")
JUDGE = (PLANS, FAULTS, "suites/router suites/shared_expert_gate suites/grouped_linear suites/experts")
WORLDS = (f"{RANKED}dispatcher.py {RANKED}properties.py", f"{RANKED}strangers.py")
PROCESSES = (f"{RANKED}ranks.py {RANKED}crash.py {RANKED}injection.py", f"{RANKED}strangers.py {RANKED}torchrun.py")

# The first pattern that fits decides; {stem} is the module's own, or its stage.
RULES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("reference/dispatcher.py", (f"{RANKED}reference.py", WORLDS[0])),
    ("reference/reduction.py", (f"{RANKED}reference.py", LINEAR)),
    ("reference/parallel_linear.py", (LINEAR,)),
    ("reference/*.py", (*STAGE, FAULTS, "suites/moe_block")),
    ("harness/core/call.py", JUDGE),
    ("harness/stages/model/*.py", ("suites/model",)),
    ("harness/stages/parallel_linear/*.py", (LINEAR,)),
    ("harness/stages/dispatcher/*.py", WORLDS),
    ("harness/stages/reduction/*.py", ("suites/reduction",)),
    ("harness/stages/router/probes.py", (f"{META}computing.py",)),
    ("harness/stages/experts/exact.py", (f"{META}cases.py", "suites/experts", FAULTS)),
    ("harness/stages/*/stage.py", (*STAGE, FAULTS)),
    ("harness/stages/*/laws.py", (*STAGE, FAULTS)),
    ("harness/stages/*.py", STAGE),
    ("harness/core/plan.py", (PLANS, ALL_STAGES)),
    ("harness/checks/*.py", JUDGE),
    ("harness/core/compare.py", (f"{META}compare.py", *JUDGE)),
    ("harness/core/findings.py", JUDGE),
    ("harness/core/memory.py", JUDGE),
    ("harness/core/bounds.py", JUDGE),
    ("harness/core/invocation.py", JUDGE),
    ("harness/core/contracts.py", (f"{META}catalogue.py {META}power.py", CLI)),
    ("harness/run/property_search.py", (f"{ALL_STAGES} -k property",)),
    ("harness/run/data_power.py", (f"{META}power.py {META}audit.py", ALL_STAGES)),
    ("harness/core/stage.py", (f"{META}power.py {META}audit.py", *JUDGE)),
    ("harness/proof/audit.py", (f"{META}audit.py",)),
    ("harness/diagnosis/numerics_probes.py", (f"{META}computing.py",)),
    ("harness/core/error_patterns.py", (f"{META}diagnosis.py",)),
    ("harness/diagnosis/ranked.py", (DIAGNOSIS_RANKED,)),
    ("harness/diagnosis/clusters.py", (f"{META}clusters.py",)),
    ("harness/diagnosis/conditions.py", (f"{META}clusters.py",)),
    ("harness/diagnosis/*.py", (f"{META}diagnosis.py",)),
    ("harness/bench/*.py", ("suites/performance",)),
    ("harness/proof/kill_matrix.py", (f"{META}kill_matrix.py",)),
    ("harness/pytest_*.py", ("suites/router", f"{META}pytest_plugin.py")),
    ("harness/run/result_builder.py", (f"{META}power.py", DIAGNOSIS_RANKED, CLI, ISOLATION)),
    ("harness/run/session.py", (f"{META}power.py", DIAGNOSIS_RANKED, CLI, ISOLATION)),
    ("harness/process/parent_watch.py", (f"{META}isolation.py -k ends_with",)),
    ("harness/process/pool.py", ("suites/router", ISOLATION)),
    ("harness/process/*.py", ("suites/router", f"{META}power.py", ISOLATION)),
    ("harness/api.py", (f"{META}api.py",)),
    ("harness/core/errors.py", (CLI,)),
    ("harness/core/environment.py", (CLI,)),
    ("harness/core/ranked_*.py", WORLDS),
    ("harness/core/*.py", JUDGE),
    ("harness/ranks/backend.py", (f"{RANKED}strangers.py", DIAGNOSIS_RANKED)),
    ("harness/ranks/*.py", PROCESSES),
    ("*.py", JUDGE),  # what no rule names
)


def suites_of(module: str) -> tuple[str, ...]:
    """The arguments of the pytest runs that judge `module`, a path from the root; only suites that exist."""
    _, suites = rule_of(module)
    path = PurePosixPath(module)
    stem = path.parts[2] if module.startswith("harness/stages/") else path.stem
    named = [entry.format(stem=stem) for entry in suites]
    return tuple(entry for entry in named if all((ROOT / path).exists() for path in entry.partition(" -k")[0].split()))


def rule_of(module: str) -> tuple[str, tuple[str, ...]]:
    """The first rule whose pattern fits; the last one fits all."""
    return next(rule for rule in RULES if fnmatch(module, rule[0]))
