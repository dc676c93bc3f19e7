"""Megatron Core's router.  Used where installed."""
