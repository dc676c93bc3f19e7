"""The checks: each judges one implementation on one case and returns what it found.

`plain` serves every check whose point is the data (exact, numeric, layouts, ...); the others call more than once.
"""

from collections.abc import Callable

from moe_harness.harness.checks import cuda, laws, memory, repeats
from moe_harness.harness.checks.plain import contract, plain
from moe_harness.harness.core.case import Case
from moe_harness.harness.core.findings import Record
from moe_harness.harness.core.invocation import Trial

Check = Callable[[Trial, Case], Record]

CHECKS: dict[str, Check] = {
    "contract": contract,
    "exact": plain,
    "numeric": plain,
    "routing": plain,
    "property": plain,
    "sentinels": plain,
    "layouts": plain,
    "special": plain,
    "memory": memory.memory,
    "leak": memory.leak,
    "laws": laws.laws,
    "determinism": repeats.determinism,
    "batch_invariance": repeats.batch_invariance,
    "graph_replay": cuda.graph_replay,
    "side_stream": cuda.side_stream,
    "large_offsets": cuda.large_offsets,
}
