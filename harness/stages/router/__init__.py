"""The stage `router`: the choice of experts and their weights."""
