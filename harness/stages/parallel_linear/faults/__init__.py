"""Wrong implementations of the stage `parallel_linear`."""
