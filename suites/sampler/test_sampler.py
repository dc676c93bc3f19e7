"""The stage `sampler`: any implementation, check by check.

pytest suites/sampler --impl my_kernel.py:function -n auto
"""

import pytest

from moe_harness.suites.checks import checks_of

IMPLEMENTATIONS = ("torch",)  # judged when no --impl is given

pytestmark = pytest.mark.stage("sampler")
vars().update(checks_of("sampler"))
