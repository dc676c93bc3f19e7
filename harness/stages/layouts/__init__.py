"""The stage `layouts`: the one reduction of a layer over ranks."""
