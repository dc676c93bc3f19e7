"""What is judged, as plain data: frozen specs with an id that replays, and the plan of a run.  Nothing here needs torch."""

from harness.cases.spec import Case, parse, parse_id
from harness.cases.plans import Planned, plan

__all__ = ["Case", "Planned", "parse", "parse_id", "plan"]
