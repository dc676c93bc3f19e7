"""The one name under which everything is imported and installed.

In the tree, the folders beside this one keep their plain names and are linked here: `moe_harness.harness` is `harness/`
from a checkout as well as from a wheel, and no generic name (`harness`, `reference`, ...) is taken from users.
"""

__version__ = "0.1.0"
