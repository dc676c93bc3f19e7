"""What the strategies of the stages draw from: sizes, counts and layouts, small and odd ones first."""

from hypothesis import strategies as st

from moe_harness.harness.core import boundaries

SIZE = st.integers(1, 12) | st.sampled_from((16, 17, 31, 33, 48, 64, 65, 96, 100))
TOKENS = st.integers(0, 12) | st.sampled_from(boundaries.TOKENS)
EXPERTS = st.integers(1, 12) | st.sampled_from((16, 60, 64, 72, 128))


def layouts(operands: tuple[str, ...]) -> st.SearchStrategy[str]:
    """No layout, or that of one operand."""
    named = st.builds("{}:{}".format, st.sampled_from(operands), st.sampled_from(boundaries.LAYOUTS[:5]))
    return st.just("") | named
