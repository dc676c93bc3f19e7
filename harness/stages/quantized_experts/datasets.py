"""Small cases of every kind of the stage `quantized_experts`, spelled as in ids: its faults are told apart on them."""

from collections.abc import Iterator

from moe_harness.harness.stages.quantized_experts.cases import FORMATS, SPECIALS

BASE = "T=21,E=5,k=2"
CHANGES = """
    T=1 T=70 k=1 E=1,k=1 H=200,I=72 H=128,I=128
    activation=gelu_tanh masked=some,map=alternate,bias=1 map=block,E=8
    routing=duplicates weights=model T=64,E=2,k=1
    layout=gate_up_scale:padded layout=down_scale:transposed layout=gate_up_proj:padded
"""
OF_A_FORMAT = "bias=1 activation=swiglu_oai,bias=1 H=512,I=384 data=exact dtype=bf16"


def probes() -> Iterator[str]:
    """Fields of the cases that are not at their default."""
    for format in FORMATS:
        own = f"{BASE},format={format}"
        yield own
        yield from (f"{own},{change}" for change in OF_A_FORMAT.split())
        for data, formats in SPECIALS.items():
            if format in formats or (not formats and format == "fp8_block"):
                yield f"{own},data={data},I=256"
    yield from (f"{BASE},{change}" for change in CHANGES.split())
