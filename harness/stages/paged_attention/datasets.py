"""Small cases of every kind of the stage `paged_attention`, spelled as in ids: its faults are told apart on them."""

from collections.abc import Iterator

BASE = "S=4,length=45"
CHANGES = """
    queries=prompt queries=mixed queries=few queries=chunk
    page=16 page=1 page=32,length=70
    Hq=6,Hk=3,D=20 Hq=5,Hk=1 S=1,length=19 S=1,length=9
    scale=0.125 scale=1.0 order=head empties=1,queries=mixed,S=7 shared=1 past=wild stale=large
"""
DATA = ("far_scores", "negative_scores", "one_peak", "offset_values", "huge_values", "q_nan", "key_nan")


def probes() -> Iterator[str]:
    """Fields of the cases that are not at their default."""
    yield BASE
    yield from (f"{BASE},{change}" for change in CHANGES.split())
    for data in DATA:
        yield f"{BASE},data={data}"
        yield f"{BASE},data={data},queries=few"
    for layout in ("q:padded", "block_table:padded", "value_cache:outer_padded", "key_cache:outer_padded"):
        yield f"{BASE},layout={layout}"
    yield from (f"S=2,length={length},page=16,D=32" for length in (130, 300, 600, 1100))
    yield "S=2,length=100,page=16,D=32,queries=prompt"
    for dtype in ("fp32", "fp16", "bf16"):
        yield f"S=3,length=70,queries=chunk,Hq=8,Hk=2,D=128,page=16,dtype={dtype}"
