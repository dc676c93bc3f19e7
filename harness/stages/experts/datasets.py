"""Small cases of every kind of the stage `experts`, spelled as in ids: its faults are told apart on them."""

from collections.abc import Iterator

BASE = "T=21,H=72,I=40,E=6,k=3"
SHAPES = """
    k=1 T=1 T=1,activation=gelu_tanh T=3 T=5 T=8 T=65
    H=40 H=48 H=64 H=32 H=33 H=16 I=23 I=64 I=96 I=25 I=48 H=24,I=24 H=32,I=16 H=48,I=48,T=64
    routing=duplicates T=40,routing=one,k=1 T=70,routing=skewed
    T=64,E=4,k=3 E=8,T=9 E=7,k=2,T=4 E=12,k=10 E=1,k=1 E=3,k=2,T=2
"""
MASKED = "map=block map=alternate,E=9,k=4 masked=all,T=4 masked=some,T=70"
DATA = """
    token_nan token_inf expert_nan expert_inf down_inf unused_expert_nan huge tiny signed_weights cancelling exact
"""
LAYOUTS = """
    hidden_states:padded hidden_states:transposed gate_up_proj:padded down_proj:padded
    gate_up_proj:transposed topk_ids:padded topk_weights:padded topk_ids:strided
"""
BEYOND = """
    T=9,H=32,I=8,E=128,k=8 T=9,H=32,I=8,E=128,k=7 T=9,H=32,I=8,E=256,k=2 T=9,H=32,I=8,E=300,k=4,routing=last
    T=2,H=16,I=4104,E=2,k=1 T=4097,H=16,I=8,E=9,k=8 T=33000,H=8,I=8,E=2,k=1,routing=one
"""


def probes() -> Iterator[str]:
    """Fields of the cases that are not at their default."""
    yield BASE
    yield f"{BASE},activation=gelu_tanh"
    yield from (f"{BASE},{change}" for change in SHAPES.split())
    for masked in ("some", "rows", "one"):
        yield from (f"{BASE},masked={masked},map={kind},E=7" for kind in ("none", "alternate", "block"))
    yield from (f"{BASE},{change}" for change in MASKED.split())
    yield from (f"{BASE},data={data}" for data in DATA.split())
    yield from (f"{BASE},layout={layout},H=40" for layout in LAYOUTS.split())
    yield f"{BASE},layout=hidden_states:padded,masked=some,H=48"
    for dtype in ("fp32", "fp16", "bf16"):
        yield f"{BASE},dtype={dtype},H=512,k=4"
        yield f"{BASE},dtype={dtype},H=33"
        yield f"{BASE},dtype={dtype},data=huge,weights=model"
    yield f"{BASE},ints=int32"
    yield from BEYOND.split()
