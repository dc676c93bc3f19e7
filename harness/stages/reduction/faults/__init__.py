"""Wrong implementations of the stage `layouts`."""
