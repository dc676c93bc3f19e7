"""Its laws."""

from moe_harness.harness.core.call import Call
from moe_harness.harness.core.laws import Term, changed


def scale_invariance(call: Call) -> list[Term]:
    """Rows times four have the same norm, up to eps."""
    return [Term(changed(call, x=call.args["x"] * 4.0)), Term(changed(call, x=call.args["x"] * 16.0), -1.0)]
