"""Small cases of every kind of the stage `rms_norm`, spelled as in ids: its faults are told apart on them."""

from collections.abc import Iterator

CHANGES = """
    H=33 H=48 H=16 H=7 H=2048 H=5120 lead=1 lead=2x3 lead=5x1x4 lead=129,H=16 eps=0.001 eps=1e-05
"""


def probes() -> Iterator[str]:
    """Fields of the cases that are not at their default."""
    for residual in (0, 1):
        base = f"lead=13,H=72,residual={residual}"
        yield base
        yield from (f"{base},{change}" for change in CHANGES.split())
        for data in ("tiny", "offset", "spike", "huge", "zero_row", "row_nan", "cancelling"):
            yield f"{base},data={data}"
            yield f"{base},data={data},eps=0.001"
        for layout in ("x:padded", "weight:strided", "residual:padded", "x:transposed"):
            yield f"{base},layout={layout},H=33" if residual or "residual" not in layout else base
        yield from (f"{base},dtype={dtype},H=2048,lead=65" for dtype in ("fp32", "fp16", "bf16"))
