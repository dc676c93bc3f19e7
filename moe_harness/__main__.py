"""`python -m moe_harness`: the command line without its installed script, from a checkout for example."""

from moe_harness.harness.commands.app import main

main()
