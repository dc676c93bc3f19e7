"""Small cases of every kind of the stage `grouped_linear`, spelled as in ids: its faults are told apart on them."""

from collections.abc import Iterator

BASE = "S=37,K=72,N=40,E=5"
CHANGES = """
    K=40 K=48 K=64 K=16 K=33 N=48 N=24 N=33 K=32,N=32
    S=1 S=3,E=1 S=15,E=4 S=128,E=8,sizes=even S=300,E=2 S=70,E=20,sizes=even E=1
    K=40,bias=1
    data=row_nan data=row_inf data=expert_nan data=expert_inf data=unused_expert_nan
    data=huge data=tiny data=cancelling data=exact
"""
LAYOUTS = ("x:padded", "x:transposed", "weight:padded", "weight:transposed", "bias:padded", "group_sizes:strided")


def probes() -> Iterator[str]:
    """Fields of the cases that are not at their default."""
    yield BASE
    yield f"{BASE},bias=1"
    for sizes in ("sparse", "first", "last", "even", "ones"):
        yield f"{BASE},sizes={sizes}"
        yield f"{BASE},sizes={sizes},bias=1,E=8"
    yield from (f"{BASE},{change}" for change in CHANGES.split())
    yield from (f"{BASE},layout={layout},K=40,N=40,bias=1" for layout in LAYOUTS)
    yield from (f"{BASE},dtype={dtype},K=512" for dtype in ("fp32", "fp16", "bf16"))
    yield f"{BASE},ints=int32"
    yield "S=300,K=8,N=8,E=260,sizes=even"
    yield "S=33000,K=4,N=4,E=3"
