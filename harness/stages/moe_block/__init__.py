"""The stage `moe_block`: a whole sparse layer."""
