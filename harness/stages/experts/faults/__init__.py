"""Wrong implementations of the stage `experts`."""
