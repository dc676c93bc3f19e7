"""Many ranks: persistent workers driven by one controller, a recording communicator, proof of deadlock.

The controller imports no torch: what it sends is (path of a callable, plain spec, seed), what it gets back is plain
data and the record of every collective.  `pool.run` is the way in.
"""
