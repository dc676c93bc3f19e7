"""The stage `model` over ranks: one model of them all, every call made on each alike."""

from collections.abc import Iterator

from moe_harness.harness.core.findings import Finding
from moe_harness.harness.core.ranked_stage import RankedStage, Reports


def across(reports: Reports) -> Iterator[Finding]:
    """Tokens are the same on every rank: one that goes on with another token is lost to the others."""
    first = reports[0].get("tokens")
    for rank, report in enumerate(reports):
        tokens = report.get("tokens")
        if first is None or tokens is None or tokens == first:
            continue
        row, place = next(
            (row, place)
            for row, (ours, theirs) in enumerate(zip(tokens, first, strict=True))
            for place, (own, other) in enumerate(zip(ours, theirs, strict=True))
            if own != other
        )
        how = "drawn" if report["drawn"] else "greedy"
        yield Finding(
            f"the ranks' {how} tokens differ: new token {place} of prompt {row} is {first[row][place]} on rank 0 "
            f"and {tokens[row][place]} on rank {rank}; a call is made on all ranks alike and has one answer",
            where={"rank": rank, "prompt": row, "new token": place},
            diagnosis=[CAUSES[how]],
        )
        return


CAUSES = {
    "drawn": {
        "fault": "draws differ by rank",
        "evidence": "each rank draws for itself, with a seed, noise or logits of its own",
    },
    "greedy": {
        "fault": "ranks choose tokens apart",
        "evidence": "each rank takes the largest of logits of its own: a shard, or sums that differ by rank",
    },
}

RANKED = RankedStage(
    made_from=("model_dir",),
    named=("device", "dtype", "group", "expert_parallel"),
    checks=("over_ranks",),
    further=("contract", "ranks"),
    is_function=True,
    searches=False,
    across=across,
)
