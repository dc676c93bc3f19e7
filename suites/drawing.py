"""How many cases a property test draws."""

from hypothesis import settings

USUAL = 100  # of Hypothesis' own default, which the profile ci keeps


def examples(usual: int) -> int:
    """`usual` cases under the profile ci, ten times as many at night; read where a module of tests is imported."""
    return usual * settings.default.max_examples // USUAL
