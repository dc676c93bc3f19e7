"""Imported once by the fork server, so that a new worker starts in milliseconds.

`torch.testing.assert_close` imports several hundred modules on its first call, hence the call here.
"""

import torch

import moe_harness.harness.ranks.worker  # noqa: F401

torch.set_num_threads(1)
torch.testing.assert_close(torch.zeros(1), torch.zeros(1))
