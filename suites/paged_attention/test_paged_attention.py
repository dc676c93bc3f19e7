"""The stage `paged_attention`: any implementation, check by check.

pytest suites/paged_attention --impl my_kernel.py:function -n auto
"""

import pytest

from moe_harness.suites.checks import checks_of

IMPLEMENTATIONS = ("torch",)  # judged when no --impl is given

pytestmark = pytest.mark.stage("paged_attention")
vars().update(checks_of("paged_attention"))
