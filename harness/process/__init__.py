"""Processes that judge: started, spoken to, watched and ended."""
