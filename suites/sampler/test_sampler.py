"""The stage `sampler`: any implementation, check by check.

pytest suites/sampler --impl my_kernel.py:function -n auto
"""

import pytest

IMPLEMENTATIONS = ("torch",)  # judged when no --impl is given

pytestmark = pytest.mark.stage("sampler")


def test_contract(verdict):
    """Shapes, dtype, device, aliasing, exceptions; the forms every caller uses."""
    verdict()


def test_exact(verdict):
    """Temperature 0: the largest logit."""
    verdict()


def test_numeric(verdict):
    """Tokens that may be drawn, as often as they should be, independently."""
    verdict()


def test_layouts(verdict):
    """Each operand's strides varied alone, with NaN behind every row."""
    verdict()


def test_memory(verdict):
    """Inputs, earlier results, poisoned allocations, state left by other calls."""
    verdict()


def test_special(verdict):
    """Masked tokens, ties, peaks, logits far from 0, very high and very low temperatures."""
    verdict()


def test_laws(verdict):
    """A token depends on its row, seed and position alone."""
    verdict()


def test_determinism(verdict):
    """Same call, same bits, where declared."""
    verdict()


def test_batch_invariance(verdict):
    """Same row, same bits, where declared."""
    verdict()


def test_leak(verdict):
    """Memory does not grow from call to call."""
    verdict()


@pytest.mark.gpu
def test_graph_replay(verdict):
    """CUDA graph replay with changed inputs and poisoned outputs."""
    verdict()


@pytest.mark.gpu
def test_side_stream(verdict):
    """Late inputs on a stream of its own."""
    verdict()


@pytest.mark.gpu
def test_large_offsets(verdict):
    """More than 2^31 elements in one operand."""
    verdict()


def test_property(falsify):
    """Hypothesis over specs finds no case that fails."""
    falsify()
