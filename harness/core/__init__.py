"""What every part of the judge shares: cases, calls, bounds, comparison, findings, the catalogue of faults."""
