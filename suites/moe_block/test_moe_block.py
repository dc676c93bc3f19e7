"""The stage `moe_block`: any implementation, check by check.

pytest suites/moe_block --impl my_kernel.py:function -n auto
"""

import pytest

from moe_harness.suites.checks import checks_of

IMPLEMENTATIONS = ("torch:loop",)  # judged when no --impl is given

pytestmark = pytest.mark.stage("moe_block")
vars().update(checks_of("moe_block"))
