"""The stage `rope_cache`: heads normalised and rotated, keys and values written to their slots."""
