"""Wrong implementations of the stage `rope_cache`."""
