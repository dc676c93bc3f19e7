"""The stage `shared_expert_gate`: any implementation, check by check.

pytest suites/shared_expert_gate --impl my_kernel.py:function -n auto
"""

import pytest

from moe_harness.suites.checks import checks_of

IMPLEMENTATIONS = ("torch:loop",)  # judged when no --impl is given

pytestmark = pytest.mark.stage("shared_expert_gate")
vars().update(checks_of("shared_expert_gate"))
