"""Why an implementation is wrong: the catalogue's fault whose output equals its output, with evidence in numbers.

`search.explain` is called in the process that has just judged a failing case.  A fault is named only where its output
equals the implementation's within the statistical limits of `harness.core.bounds`, where the right answer does not, and
where a second, different data set says the same.  `patterns.looks` reads the error itself, for failures that no fault
explains too.  `clusters` puts failures together: it imports no torch, since the controlling process asks for it, and so
nothing is imported here.
"""
