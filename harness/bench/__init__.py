"""Timing of implementations, and its pictures."""
