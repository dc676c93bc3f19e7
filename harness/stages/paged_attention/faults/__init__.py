"""Wrong implementations of the stage `paged_attention`."""
