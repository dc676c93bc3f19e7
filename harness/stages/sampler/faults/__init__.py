"""Wrong implementations of the stage `sampler`."""
