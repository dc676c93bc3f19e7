"""A kernel's whole suite: one test per case of every check."""

import pytest

pytestmark = pytest.mark.stage("experts", "my_experts.py:experts")


def test_experts(verdict):
    verdict()
