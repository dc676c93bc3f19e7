"""What is judged, as plain data: frozen specs with ids that replay, and the plan of a run; none of it needs torch."""

from moe_harness.harness.cases.plans import Planned, plan
from moe_harness.harness.cases.spec import Case, parse, parse_id

__all__ = ["Case", "Planned", "parse", "parse_id", "plan"]
