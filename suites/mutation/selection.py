"""Which suites judge an edit of which module: of its own stem first, then the tests of the judge that go through it.

Each entry is the arguments of one pytest run.  Runs follow one another, likeliest killer first, until one fails.  All
of them together take about a minute on an idle core, since that is what every edit costs that nobody notices; what the
rest of the suites would notice besides is not counted.  suites/meta/test_mutation.py holds that every module has a rule
and every entry a test: what judges nothing notices nothing.
"""

from fnmatch import fnmatch
from pathlib import PurePosixPath

META, RANKED, LINEAR = "suites/meta/test_", "suites/dispatcher/test_", "suites/parallel_linear"
MODEL, GATE, RECORD = "suites/model/test_", "suites/accuracy/test_", "suites/record"
PLANS = f"{META}rounding.py {META}cases.py {META}power.py"
FAULTS = f"{META}catalogue.py {META}published.py"
ALL_STAGES = "suites/router suites/grouped_linear suites/shared_expert_gate suites/experts suites/moe_block"
CLI = f"{META}cli.py -k 'not ctrl_c'"
ISOLATION = f"{META}isolation.py -k 'not floods and not hangs'"
DIAGNOSIS, DIAGNOSIS_RANKED = f"{META}diagnosis.py", f"{META}diagnosis_ranked.py"
STRANGERS = f"{META}causes_of_strangers.py"
PROBES = f"{META}computing.py {META}probed.py"
BENCH = "suites/performance/test_bench.py suites/performance/test_bench_model.py"
DECODER = f"{MODEL}reference.py"

STAGE = ("suites/{stem}", f"{PLANS} -k {{stem}}")
JUDGE = (PLANS, FAULTS, "suites/router suites/shared_expert_gate suites/grouped_linear suites/experts")
WORLDS = (f"{RANKED}dispatcher.py {RANKED}properties.py", f"{RANKED}strangers.py")
PROCESSES = (f"{RANKED}ranks.py {RANKED}crash.py {RANKED}injection.py", f"{RANKED}strangers.py {RANKED}torchrun.py")
VERDICTS = f"{RANKED}verdicts.py -k 'not busy and not unusual'"

# The first pattern that fits decides; {stem} is the module's own, or its stage.
RULES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("reference/dispatcher.py", (f"{RANKED}reference.py", WORLDS[0])),
    ("reference/reduction.py", (f"{RANKED}reference.py", LINEAR)),
    ("reference/parallel_linear.py", (LINEAR,)),
    ("reference/model.py", (DECODER, f"{MODEL}stage.py {MODEL}causes.py")),
    ("reference/layers.py", (DECODER, f"{MODEL}causes.py")),
    ("reference/attention.py", (DECODER, f"{MODEL}causes.py")),
    ("reference/rope.py", (DECODER, f"{MODEL}causes.py")),
    ("reference/delta_net.py", (f"{DECODER} {MODEL}linear_attention.py",)),
    ("reference/moe_block.py", (*STAGE, FAULTS, f"{META}block_parts.py")),
    ("reference/*.py", (*STAGE, FAULTS, "suites/moe_block")),
    ("harness/stages/model/causes.py", (f"{MODEL}causes.py",)),
    ("harness/stages/model/changes.py", (f"{MODEL}causes.py",)),
    ("harness/stages/model/bisect.py", (f"{MODEL}bisect.py",)),
    ("harness/stages/model/folder.py", (f"{MODEL}bisect.py",)),
    ("harness/stages/model/served.py", (f"{MODEL}served.py",)),
    ("harness/stages/model/spread.py", (f"{MODEL}over_ranks.py",)),
    ("harness/stages/model/ranked.py", (f"{MODEL}over_ranks.py",)),
    ("harness/stages/model/rank_task.py", (f"{MODEL}over_ranks.py",)),
    ("harness/stages/model/*.py", (f"{MODEL}stage.py", f"{MODEL}causes.py {MODEL}served.py", f"{MODEL}over_ranks.py")),
    ("harness/stages/parallel_linear/*.py", (LINEAR,)),
    ("harness/stages/dispatcher/data.py", (f"{RANKED}data.py", *WORLDS)),
    ("harness/stages/dispatcher/*.py", WORLDS),
    ("harness/stages/reduction/*.py", ("suites/reduction",)),
    ("harness/stages/*/probes.py", (PROBES,)),
    ("harness/stages/*/bench.py", (BENCH,)),
    ("harness/stages/*/strategy.py", ("suites/{stem} -k property",)),
    ("harness/stages/*/disguise.py", (f"{DIAGNOSIS} -k {{stem}}", DIAGNOSIS)),
    ("harness/stages/*/datasets.py", (f"{DIAGNOSIS} -k {{stem}}", STRANGERS)),
    ("harness/stages/*/wrong.py", (f"{META}one_catalogue.py {META}power.py", "suites/{stem}")),
    ("harness/stages/sampler/causes.py", (f"{STRANGERS} -k sampler", f"{DIAGNOSIS} -k sampler")),
    ("harness/stages/router/likelihood.py", (f"{STRANGERS} -k choice", DIAGNOSIS)),
    ("harness/stages/experts/exact.py", (f"{META}cases.py", "suites/experts", FAULTS)),
    ("harness/stages/*/stage.py", (*STAGE, FAULTS)),
    ("harness/stages/*/bound.py", (*STAGE, f"{META}tf32.py")),
    ("harness/stages/*/laws.py", (*STAGE, FAULTS)),
    ("harness/stages/*.py", STAGE),
    ("harness/core/plan.py", (PLANS, ALL_STAGES)),
    ("harness/checks/*.py", JUDGE),
    ("harness/core/compare.py", (f"{META}compare.py", *JUDGE)),
    ("harness/core/findings.py", (VERDICTS, *JUDGE)),
    ("harness/core/contracts.py", (f"{META}catalogue.py {META}power.py", CLI)),
    ("harness/core/blame.py", (f"{META}blame.py",)),
    ("harness/core/functions.py", (f"{META}api.py",)),
    ("harness/core/http.py", (f"{GATE}server.py", f"{GATE}answerers.py")),
    ("harness/core/kept.py", (CLI,)),
    ("harness/core/least_squares.py", (f"{META}least_squares.py", DIAGNOSIS)),
    ("harness/core/own_time.py", (f"{META}isolation.py -k waiting", DIAGNOSIS)),
    ("harness/core/registry.py", (f"{META}new_stage.py {META}init.py", CLI)),
    ("harness/core/stage.py", (f"{META}power.py {META}audit.py {META}rows.py", *JUDGE)),
    ("harness/core/error_patterns.py", (f"{META}error_patterns.py", DIAGNOSIS)),
    ("harness/core/errors.py", (CLI,)),
    ("harness/core/environment.py", (f"{META}lacking.py", CLI)),
    ("harness/core/memory.py", (f"{META}memory.py", *JUDGE)),
    ("harness/core/emulation.py", (f"{META}memory.py", FAULTS)),
    ("harness/core/ranked_*.py", (f"{META}new_stage.py {META}diagnosis_ranked.py", *WORLDS)),
    ("harness/core/*.py", JUDGE),
    ("harness/run/property_search.py", (f"{ALL_STAGES} -k property",)),
    ("harness/run/data_power.py", (f"{META}power.py {META}audit.py", ALL_STAGES)),
    ("harness/run/*.py", (f"{META}power.py {META}deaths.py", DIAGNOSIS_RANKED, VERDICTS, CLI, ISOLATION)),
    ("harness/proof/audit.py", (f"{META}audit.py",)),
    ("harness/proof/breadth.py", (f"{META}breadth.py",)),
    ("harness/proof/gate_matrix*.py", (f"{GATE}gate_matrix.py",)),
    ("harness/proof/*.py", (f"{META}kill_matrix.py", f"{META}breadth.py")),
    ("harness/diagnosis/numerics_probes.py", (PROBES,)),
    ("harness/diagnosis/prob*.py", (PROBES,)),
    ("harness/diagnosis/ranked.py", (DIAGNOSIS_RANKED,)),
    ("harness/diagnosis/clusters.py", (f"{META}clusters.py",)),
    ("harness/diagnosis/conditions.py", (f"{META}clusters.py",)),
    ("harness/diagnosis/*.py", (DIAGNOSIS, STRANGERS)),
    ("harness/bench/*.py", (BENCH,)),
    ("harness/pytest_*.py", ("suites/router", f"{META}pytest_plugin.py")),
    ("harness/process/parent_watch.py", (f"{META}isolation.py -k ends_with",)),
    ("harness/process/deaths.py", (f"{META}deaths.py",)),
    ("harness/process/pool.py", ("suites/router", f"{META}deaths.py", ISOLATION)),
    ("harness/process/worker.py", (f"{META}checks_cuda.py {META}deaths.py {META}power.py", "suites/router", ISOLATION)),
    ("harness/process/*.py", ("suites/router", f"{META}power.py", f"{META}deaths.py", ISOLATION)),
    ("harness/api.py", (f"{META}api.py",)),
    ("harness/ranks/backend.py", (f"{RANKED}strangers.py", DIAGNOSIS_RANKED)),
    ("harness/ranks/comm.py", (f"{RANKED}works.py", *PROCESSES)),
    ("harness/ranks/failure.py", (f"{RANKED}classify.py", VERDICTS, *PROCESSES)),
    ("harness/ranks/launch.py", (f"{MODEL}ranked_calls.py",)),
    ("harness/ranks/*.py", (VERDICTS, *PROCESSES)),
    ("harness/record/*.py", (RECORD,)),
    ("harness/gate/answerers/server.py", (f"{GATE}server.py",)),
    ("harness/gate/answerers/*.py", (f"{GATE}answerers.py",)),
    ("harness/gate/identity.py", (f"{GATE}identity.py {GATE}exchange.py",)),
    ("harness/gate/statistics.py", (f"{GATE}statistics.py {GATE}judging.py",)),
    ("harness/gate/*.py", (f"{GATE}judging.py {GATE}exchange.py", f"{GATE}server.py {GATE}answerers.py")),
    ("*.py", JUDGE),  # what is new, until a rule names it
)


def suites_of(module: str) -> tuple[str, ...]:
    """The arguments of the pytest runs that judge `module`, a path from the root."""
    _, suites = rule_of(module)
    path = PurePosixPath(module)
    stem = path.parts[2] if module.startswith("harness/stages/") else path.stem
    return tuple(entry.format(stem=stem) for entry in suites)


def rule_of(module: str) -> tuple[str, tuple[str, ...]]:
    """The first rule whose pattern fits; the last one fits all."""
    return next(rule for rule in RULES if fnmatch(module, rule[0]))
