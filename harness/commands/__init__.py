"""Commands of `moe-harness` that have a file of their own; `harness.cli` registers them."""
