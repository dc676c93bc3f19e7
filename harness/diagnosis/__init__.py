"""Why an implementation is wrong: the catalogue's fault whose output equals its output, with evidence in numbers.

`explain` is called in the process that has just judged a failing case.  A fault is named only where its output equals
the implementation's within the statistical limits of `harness.core.bounds`, where the right answer does not, and where
a second, different data set says the same.  `looks` reads the error itself, for failures that no fault explains too.
"""

from moe_harness.harness.diagnosis.patterns import looks
from moe_harness.harness.diagnosis.search import explain

__all__ = ["explain", "looks"]
