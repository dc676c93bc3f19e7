"""The stage `paged_attention`: any implementation, check by check.

pytest suites/paged_attention --impl my_kernel.py:function -n auto
"""

import pytest

IMPLEMENTATIONS = ("torch",)  # judged when no --impl is given

pytestmark = pytest.mark.stage("paged_attention")


def test_contract(verdict):
    """Shapes, dtype, aliasing, exceptions; no sequence, sequences without queries or keys."""
    verdict()


def test_exact(verdict):
    """Every query picks one key, and gets its value bit for bit."""
    verdict()


def test_numeric(verdict):
    """Within the elementwise bound, by its largest value and by rms."""
    verdict()


def test_layouts(verdict):
    """Each operand's strides varied alone, with NaN behind every row."""
    verdict()


def test_memory(verdict):
    """Inputs, earlier results, poisoned allocations, state left by other calls."""
    verdict()


def test_special(verdict):
    """NaN, scores beyond exp, equal keys, one peak, values with an offset."""
    verdict()


def test_laws(verdict):
    """Relations that hold without a reference."""
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
