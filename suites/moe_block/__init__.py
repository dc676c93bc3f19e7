"""Suites of the stage `moe_block`."""
