"""Two sets of answers to the same questions become one result.

A question counts where both were asked exactly it: documents and prompts are compared by their hashes.  The verdict is
the accuracy's (statistics), unless the answers themselves have changed their nature: more of them invalid, longer or
shorter by LENGTHS, or cut off at the limit more often.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from moe_harness.harness.core.errors import CannotJudge
from moe_harness.harness.gate.exchange import SCHEMA, Gold
from moe_harness.harness.gate.statistics import Paired, Shift, needed, verdict
from moe_harness.harness.gate.task import Row

LENGTHS = 0.10  # share by which the mean length may move
MARGIN = 0.02
SAME = "baseline and candidate are the same by source, model, versions and settings: this tells nothing of a change"


@dataclass(frozen=True)
class Side:
    """One implementation with its answers."""

    spec: str
    rows: Sequence[Row]
    about: dict[str, Any] = field(default_factory=dict)


def judge(task: str, gated: str, baseline: Side, candidate: Side, margin: float) -> dict[str, Any]:
    """The result, as `--json` writes it.

    Raises:
        CannotJudge: the two did not answer the same questions, or there are none.
    """
    pairs = paired(baseline.rows, candidate.rows)
    if gated not in pairs[0][0].right:
        raise CannotJudge(f"the task has no filter {gated!r}, but {', '.join(pairs[0][0].right)}")
    scores = {name: _scores(pairs, name) for name in pairs[0][0].right}
    counted = _counted([(b.right[gated], c.right[gated]) for b, c in pairs])
    troubles, lengths = _troubles(pairs, gated, margin), _lengths(pairs)
    powerless = scores[gated]["accuracy"]["baseline"] <= margin  # the candidate cannot fall so far, whatever it does
    decided = "inconclusive" if powerless else verdict(counted, margin)
    return {
        "schema": SCHEMA, "kind": "gate", "verdict": "fail" if troubles else decided,
        "baseline": baseline.spec, "candidate": candidate.spec, "task": task, "filter": gated, "margin": margin,
        "documents": len(pairs), "accuracy": scores[gated]["accuracy"], "drop": counted.drop,
        "interval": list(counted.interval), "discordant": [counted.worse, counted.better], "p": counted.p,
        "needed": None if powerless else needed(counted, margin),
        "gold_loglikelihood": _gold(pairs), "flips": _flips(pairs),
        "invalid": _share_each(pairs, lambda row: not row.valid[gated]),
        "lengths": {
            "baseline": None if lengths is None else _mean(lengths[0]),
            "candidate": None if lengths is None else _mean(lengths[1]),
            "at_limit": _share_each(pairs, lambda row: row.answer.stop == "length"),
        },
        "filters": scores, "reasons": troubles, "notes": [SAME] if _same(baseline, candidate) else [],
        "about": {"baseline": baseline.about, "candidate": candidate.about},
        "rows": [_row(b, c, gated) for b, c in pairs],
    }  # fmt: skip


def _same(baseline: Side, candidate: Side) -> bool:
    """Whether all that is known of the two is equal: then one set of answers may have been compared with itself."""
    known = [side.about.get("identity") for side in (baseline, candidate)]
    return known[0] is not None and known[0] == known[1]


def paired(baseline: Sequence[Row], candidate: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Rows of the same question, in the order of the questions; CannotJudge where any has no partner."""
    by_id = {row.doc_id: row for row in candidate}
    if not baseline or set(by_id) != {row.doc_id for row in baseline} or len(by_id) != len(candidate):
        raise CannotJudge(
            f"the baseline answered {len(baseline)} questions, the candidate {len(candidate)}, and they should be "
            "the same ones, at least one"
        )
    pairs = [(row, by_id[row.doc_id]) for row in baseline]
    for b, c in pairs:
        if (b.doc_hash, b.prompt_hash) != (c.doc_hash, c.prompt_hash):
            raise CannotJudge(f"question {b.doc_id} was put to the two in different words, so nothing is compared")
    return pairs


def _counted(both: Sequence[tuple[bool, bool]]) -> Paired:
    return Paired(len(both), sum(b and not c for b, c in both), sum(c and not b for b, c in both))


def _scores(pairs: Sequence[tuple[Row, Row]], name: str) -> dict[str, Any]:
    counted = _counted([(b.right[name], c.right[name]) for b, c in pairs])
    return {
        "accuracy": _share_each(pairs, lambda row: row.right[name]), "drop": counted.drop,
        "interval": list(counted.interval), "discordant": [counted.worse, counted.better], "p": counted.p,
    }  # fmt: skip


def _troubles(pairs: Sequence[tuple[Row, Row]], gated: str, margin: float) -> list[str]:
    """What changed in the answers besides being right; each is significant, and larger than the margin."""
    found = []
    for what, is_so in (
        ("invalid answers", lambda row: not row.valid[gated]),
        ("answers cut off at the length limit", lambda row: row.answer.stop == "length"),
    ):
        counted = _counted([(not is_so(b), not is_so(c)) for b, c in pairs])
        if verdict(counted, margin) == "fail":
            shares = _share_each(pairs, is_so)
            found.append(f"{what}: {shares['baseline']:.1%} became {shares['candidate']:.1%}")
    if (lengths := _lengths(pairs)) is None:
        return found
    before, after = lengths
    ratio = _mean(after) / max(_mean(before), 1e-9)
    moved = Shift.of([float(a - b) for a, b in zip(after, before, strict=True)])
    if abs(ratio - 1) > LENGTHS and moved is not None and moved.interval[0] * moved.interval[1] > 0:
        found.append(f"mean length: {_mean(before):.1f} tokens became {_mean(after):.1f} ({ratio - 1:+.0%})")
    return found


def _lengths(pairs: Sequence[tuple[Row, Row]]) -> tuple[list[int], list[int]] | None:
    """Tokens of each answer of the two; None where any is not known."""
    before, after = ([row.answer.length for row in side] for side in zip(*pairs, strict=True))
    known = [length for length in (*before, *after) if length is not None]
    return (known[: len(pairs)], known[len(pairs) :]) if len(known) == 2 * len(pairs) else None


def _gold(pairs: Sequence[tuple[Row, Row]]) -> dict[str, Any] | None:
    """Candidate minus baseline, in nats per gold answer; None where one side did not measure it."""
    both = [(b.answer.gold, c.answer.gold) for b, c in pairs if b.answer.gold and c.answer.gold]
    if len(both) < len(pairs):
        return None
    differences = [c.loglikelihood - b.loglikelihood for b, c in both]
    spoiled = sum(not math.isfinite(d) for d in differences)
    shift = Shift.of([d for d in differences if math.isfinite(d)])
    return {
        "difference": None if shift is None else shift.mean,
        "interval": None if shift is None else list(shift.interval),
        "p": None if shift is None else shift.p,
        "largest": None if shift is None else shift.largest, "not_finite": spoiled,
        "baseline": _mean([b.loglikelihood for b, _ in both]),
        "per_token": None if shift is None else shift.mean * len(both) / max(1, sum(len(b.tokens) for b, _ in both)),
    }  # fmt: skip


def _flips(pairs: Sequence[tuple[Row, Row]]) -> dict[str, Any]:
    """How often the two would choose differently: whole answers, and tokens under the gold answer with their KL."""
    texts = sum(b.answer.text != c.answer.text for b, c in pairs)
    found: dict[str, Any] = {"answers": texts, "share": texts / len(pairs)}
    golds = [(b.answer.gold, c.answer.gold) for b, c in pairs if b.answer.gold and c.answer.gold]
    golds = [(b, c) for b, c in golds if b.greedy and b.tokens == c.tokens]
    if golds:
        each = [x != y for b, c in golds for x, y in zip(b.greedy, c.greedy, strict=True)]
        divergence = [_kl(x, y) for b, c in golds for x, y in zip(b.likeliest, c.likeliest, strict=True)]
        known = [value for value in divergence if value is not None]
        found |= {"tokens": sum(each), "of_tokens": len(each), "kl": _mean(known) if known else None}
    return found


def _kl(baseline: Sequence[tuple[int, float]], candidate: Sequence[tuple[int, float]]) -> float | None:
    """KL(baseline | candidate) over the tokens that both kept and the rest as one: never more than the whole KL."""
    p, q = dict(baseline), dict(candidate)
    shared = [token for token in p if token in q]
    if not shared:
        return None
    value = 0.0
    rest_p, rest_q = 1.0, 1.0
    for token in shared:
        mass = math.exp(p[token])
        value += mass * (p[token] - q[token])
        rest_p, rest_q = rest_p - mass, rest_q - math.exp(q[token])
    if rest_p > 1e-9 and rest_q > 1e-9:  # log-probabilities are kept to nine digits
        value += rest_p * math.log(rest_p / rest_q)
    return max(value, 0.0)


def _row(b: Row, c: Row, gated: str) -> dict[str, Any]:
    """One question of the result, what `compare` pairs again."""

    def side(row: Row) -> dict[str, Any]:
        gold: Gold | None = row.answer.gold
        return {
            "right": row.right[gated], "valid": row.valid[gated], "length": row.answer.length, "stop": row.answer.stop,
            "gold": None if gold is None else gold.loglikelihood,
        }  # fmt: skip

    return {
        "doc_id": b.doc_id, "doc_hash": b.doc_hash, "prompt_hash": b.prompt_hash, "baseline": side(b),
        "candidate": side(c), "texts": None if b.answer.text == c.answer.text else [b.answer.text, c.answer.text],
    }  # fmt: skip


def _share_each(pairs: Sequence[tuple[Row, Row]], is_so: Any) -> dict[str, float]:
    baseline, candidate = zip(*pairs, strict=True)
    return {"baseline": _mean([is_so(row) for row in baseline]), "candidate": _mean([is_so(row) for row in candidate])}


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
