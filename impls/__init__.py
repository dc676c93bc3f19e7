"""Implementations under judgement: `family:variant` of a stage is `impls/<family>/<stage>.py`, attribute `variant`.

They share no code with the references and the harness, which find them by name only.
"""
