"""The stage `experts`: the routed experts."""
