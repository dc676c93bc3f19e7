"""Wrong implementations of the stage `grouped_linear`."""
