"""Small cases of every kind of the stage `shared_expert_gate`, spelled as in ids: its faults are told apart on them."""

from collections.abc import Iterator

BASE = "lead=7,H=40,D=56"
CHANGES = """
    lead=1 lead=6 lead=2x3 lead=1x5 H=48 H=64,D=32 D=40 D=24 D=33 H=32,D=32 H=512
    data=row_nan data=row_inf data=output_nan data=tiny data=huge data=cancelling
    data=saturated data=saturated_off data=exact
    layout=hidden_states:padded layout=shared_output:padded layout=gate_weight:strided layout=gate_weight:padded
    layout=hidden_states:transposed layout=shared_output:transposed
    dtype=fp32,H=1024 dtype=fp16,H=1024 dtype=bf16,H=1024
"""


def probes() -> Iterator[str]:
    """Fields of the cases that are not at their default."""
    yield BASE
    yield from (f"{BASE},{change}" for change in CHANGES.split())
    yield "lead=32800,H=4,D=4"
