"""Wrong behaviours with the contract's signatures: they test the suites, guard the data and explain failures."""

from moe_harness.harness.faults.catalogue import Fault, all_faults, fault, get

__all__ = ["Fault", "all_faults", "fault", "get"]
