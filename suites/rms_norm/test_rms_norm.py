"""The stage `rms_norm`: any implementation, check by check.

pytest suites/rms_norm --impl my_kernel.py:function -n auto
"""

import pytest

from moe_harness.suites.checks import checks_of

IMPLEMENTATIONS = ("torch",)  # judged when no --impl is given

pytestmark = pytest.mark.stage("rms_norm")
vars().update(checks_of("rms_norm"))
