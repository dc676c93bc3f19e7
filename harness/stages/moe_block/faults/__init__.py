"""Wrong implementations of the stage `moe_block`."""
