"""Small cases of every kind of the stage `rope_cache`, spelled as in ids: its faults are told apart on them."""

from collections.abc import Iterator

BASE = "T=11,slots=all"
CHANGES = """
    norms=none norms=q norms=k slots=some slots=backwards slots=none
    positions=row positions=far positions=far,norms=none positions=far,D=128 positions=zero positions=zero,norms=none
    theta=1e4 theta=5e6,D=128 D=2 D=20 D=64,Hq=6,Hk=3
    page=1 page=16 page=16,T=40 page=32,T=70 Hq=5,Hk=1 Hq=2,Hk=2 T=1 order=head eps=1e-5 ids=int32
"""
LAYOUTS = ("q:padded", "k:padded", "v:padded", "value_cache:padded", "key_cache:padded", "q_norm:strided")


def probes() -> Iterator[str]:
    """Fields of the cases that are not at their default."""
    yield BASE
    yield from (f"{BASE},{change}" for change in CHANGES.split())
    yield from (f"{BASE},data={data},eps=1e-5" for data in ("tiny", "huge", "spike", "k_nan", "v_inf"))
    yield from (f"{BASE},layout={layout}" for layout in LAYOUTS)
    for dtype in ("fp32", "fp16", "bf16"):
        yield f"{BASE},dtype={dtype},D=128,positions=far,theta=1e6"
        yield f"{BASE},dtype={dtype},D=128,norms=none"
