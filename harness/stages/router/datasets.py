"""Small cases of every kind of the stage `router`, spelled as in ids: its faults are told apart on them."""

from collections.abc import Iterator

PLAIN = "T=33,E=24,k=3"
GROUPED = "T=33,E=64,k=6,groups=8x3"
SIGMOID = "scoring=sigmoid"
CHANGES = """
    k=1 k=8 k=10 E=6,renorm=0 E=32 E=128,k=8 E=128,k=7 E=320,k=8 T=1 T=3 T=4 T=5 T=32 E=3,k=3
    layout=router_logits:padded layout=router_logits:transposed
"""


def probes() -> Iterator[str]:
    """Fields of the cases that are not at their default."""
    for renorm in (1, 0):
        plain, grouped = f"{PLAIN},renorm={renorm}", f"{GROUPED},renorm={renorm}"
        for scale in (1.0, 2.5):
            yield f"{plain},scale={scale}"
            yield f"{plain},scale={scale},{SIGMOID}"
            yield f"{plain},scale={scale},{SIGMOID},bias=small"
        yield grouped
        yield f"{grouped},{SIGMOID},bias=small,scale=2.5"
        yield f"{grouped},{SIGMOID},bias=negative"
        for data in ("negative", "far_negative", "peaked", "ties", "nan_row", "minus_inf", "nan_element"):
            yield f"{plain},data={data}"
            yield f"{plain},data={data},{SIGMOID}"
    yield f"{GROUPED},{SIGMOID},bias=offset"
    yield f"{PLAIN},{SIGMOID},bias=offset,E=128"
    yield f"{PLAIN},bias=small"
    yield from (f"{PLAIN},{change}" for change in CHANGES.split())
    for dtype in ("fp32", "fp16", "bf16"):
        yield f"{PLAIN},dtype={dtype},E=256,k=8"
        yield f"{PLAIN},dtype={dtype},E=256,k=8,renorm=0,T=257"
    yield f"{PLAIN},T=257,E=512,k=10,data=ties"
