"""The stage `reduction`: the one reduction of a layer over ranks."""
