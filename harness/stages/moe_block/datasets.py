"""Small cases of every kind of the stage `moe_block`, spelled as in ids: its faults are told apart on them."""

from collections.abc import Iterator

FAMILIES = ("qwen2_moe", "qwen3_moe", "qwen3_next", "mixtral", "deepseek_v2", "deepseek_v3")
CHANGES = """
    T=9,H=40,I=24,renorm=default T=9,H=40,I=24,renorm=yes T=9,H=40,I=24,renorm=no
    T=7,H=33,I=17,shared=9,E=32,k=5 T=5,k=2 T=5,k=1 T=9,data=token_nan T=9,layout=hidden_states:padded
"""


def probes() -> Iterator[str]:
    """Fields of the cases that are not at their default."""
    for family in FAMILIES:
        yield from (f"family={family},{change}" for change in CHANGES.split())
    yield "family=deepseek_v3,T=257,E=64,k=8"  # near choices, which a rounded bias decides otherwise
