"""The stage `quantized_experts`: any implementation, check by check.

pytest suites/quantized_experts --impl my_kernel.py:function
"""

import pytest

IMPLEMENTATIONS = ("torch:dequantized", "torch:fp8_group128")  # judged when no --impl is given

pytestmark = pytest.mark.stage("quantized_experts")


def test_contract(verdict):
    """Shapes, dtype, device, aliasing, exceptions; the forms every caller uses."""
    verdict()


def test_exact(verdict):
    """Bitwise, on data for which every rounding is exact."""
    verdict()


def test_numeric(verdict):
    """Within the elementwise bound, by its largest value and by rms."""
    verdict()


def test_sentinels(verdict):
    """Ids of -1, with and without expert_map, NaN weights on them, duplicates."""
    verdict()


def test_layouts(verdict):
    """Each operand's strides varied alone, scales among them, with poison behind every row."""
    verdict()


def test_memory(verdict):
    """Inputs, earlier results, poisoned allocations, state left by other calls."""
    verdict()


def test_special(verdict):
    """NaN, zeros and extremes in codes, scales and activations."""
    verdict()


def test_laws(verdict):
    """Relations that hold without a reference: between codes, scales and inputs too."""
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
