"""Wrong implementations of the stage `router`."""
