"""The stage `rope_cache`: any implementation, check by check.

pytest suites/rope_cache --impl my_kernel.py:function -n auto
"""

import pytest

IMPLEMENTATIONS = ("torch",)  # judged when no --impl is given

pytestmark = pytest.mark.stage("rope_cache")


def test_contract(verdict):
    """Shapes, dtype, device, aliasing, exceptions; the forms every caller uses."""
    verdict()


def test_exact(verdict):
    """Nothing normalised, nothing turned: everything is only moved, to the right slot."""
    verdict()


def test_numeric(verdict):
    """Within the elementwise bound, by its largest value and by rms."""
    verdict()


def test_layouts(verdict):
    """Each operand's strides varied alone, with NaN behind every row."""
    verdict()


def test_memory(verdict):
    """Caches are the only arguments changed, in the slots of this call alone; state left by other calls."""
    verdict()


def test_special(verdict):
    """NaN, infinity, tiny and huge values, spikes beyond fp16."""
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
def test_large_offsets(verdict):
    """More than 2^31 elements in one operand."""
    verdict()


def test_property(falsify):
    """Hypothesis over specs finds no case that fails."""
    falsify()
