"""torchtitan's router.  Used where installed."""
