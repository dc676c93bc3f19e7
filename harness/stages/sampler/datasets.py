"""Small cases of every kind of the stage `sampler`, spelled as in ids: its faults are told apart on them."""

from collections.abc import Iterator

DRAWS = "dtype=fp32,data=draws,B=2048,V=17"  # many
OF_DRAWS = """
    cut=k cut=p cut=both cut=rows vary=positions vary=grid,B=4096 vary=grid,temperature=-1,cut=rows,B=4096
    cut=p,temperature=2.5 cut=both,temperature=1 temperature=0.3 V=300,temperature=1,B=4096 V=16
"""
ROWS = "dtype=fp32,B=60,V=33"  # of which each has logits of its own


def probes() -> Iterator[str]:
    """Fields of the cases that are not at their default."""
    yield DRAWS
    yield from (f"{DRAWS},{change}" for change in OF_DRAWS.split())
    for temperature in (0.0, -1.0, 0.8):
        yield from (f"{ROWS},temperature={temperature},cut={cut}" for cut in ("none", "both", "k", "p"))
    for data in ("masked", "far_down", "edge_values", "peaked", "large"):
        yield f"{ROWS},temperature=0,data={data}"
        yield f"{ROWS},data={data},cut=both"
    yield from (f"dtype=fp32,B=1,V=300,cut={cut},data=hot" for cut in ("k", "p"))  # what serves a batch is its own
    yield from (f"{ROWS},data={data}" for data in ("masked_hot", "hot", "cold"))
    yield from (f"{ROWS},temperature=0,{change}" for change in ("layout=logits:padded", "V=300", "V=2049,B=9"))
