"""The stage `quantized_experts`: any implementation, check by check.

pytest suites/quantized_experts --impl my_kernel.py:function
"""

import pytest

from moe_harness.suites.checks import checks_of

IMPLEMENTATIONS = ("torch:dequantized",)  # judged when no --impl is given; others in suites/meta/test_right.py

pytestmark = pytest.mark.stage("quantized_experts")
vars().update(checks_of("quantized_experts"))
