"""The pytest plugin as an argument, for test runs of their own from a tree that is not installed."""

from importlib.metadata import entry_points

INSTALLED = any(entry.name == "moe_harness" for entry in entry_points(group="pytest11"))
PLUGIN = () if INSTALLED else ("-p", "moe_harness.harness.pytest_plugin")  # twice would be an error
