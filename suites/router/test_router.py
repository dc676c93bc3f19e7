"""The stage `router`: any implementation, check by check.

pytest suites/router --impl my_kernel.py:function -n auto
"""

import pytest

from moe_harness.suites.checks import checks_of

IMPLEMENTATIONS = ("torch:loop",)  # judged when no --impl is given

pytestmark = pytest.mark.stage("router")
vars().update(checks_of("router"))
