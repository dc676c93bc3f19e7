"""Sharded layers and the place of the one reduction."""
