"""The stage `rope_cache`: any implementation, check by check.

pytest suites/rope_cache --impl my_kernel.py:function -n auto
"""

import pytest

from moe_harness.suites.checks import checks_of

IMPLEMENTATIONS = ("torch",)  # judged when no --impl is given

pytestmark = pytest.mark.stage("rope_cache")
vars().update(checks_of("rope_cache"))
