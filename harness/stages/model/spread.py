"""What a model over ranks yields where its ranks do one thing wrong, computed with the reference: causes in words.

Each rank holds the rows and columns that it would have: its part of a half layer is that half with the other ranks'
columns of the last projection left out, so that

    attention = sum over ranks of part_r(stream)        mlp = sum over ranks of part_r(stream)

and what happens to this sum (left out, made twice, made of the first rank's part alone) is a rule.  Where a rule's
logits are within rounding of what a rank has returned, that is what it does.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core import bounds
from moe_harness.harness.stages.model.stage import Question
from moe_harness.reference.model import HALVES, Model, State

Weights = Mapping[str, Tensor]
Rule = Callable[[int, list[Tensor]], Tensor]  # of a rank and all ranks' parts: what it adds to its stream

LAST = ("o_proj.weight", "out_proj.weight", "down_proj.weight")


def summed(rank: int, parts: list[Tensor]) -> Tensor:
    return torch.stack(parts).sum(0)


def alone(rank: int, parts: list[Tensor]) -> Tensor:
    return parts[rank]


def twice(rank: int, parts: list[Tensor]) -> Tensor:
    return len(parts) * summed(rank, parts)


def averaged(rank: int, parts: list[Tensor]) -> Tensor:
    return summed(rank, parts) / len(parts)


@dataclass(frozen=True)
class Mistake:
    """One thing that ranks do wrong; `weights` changes what they hold together, before each takes its part."""

    fault: str
    attention: Rule = summed
    mlp: Rule = summed
    shared_whole: bool = False  # every rank has all of the shared expert
    prefers: float = 0.0  # what is added to the router's logits of a rank's own experts, relative to them
    weights: Callable[[dict[str, Tensor], int, bool], dict[str, Tensor]] = lambda held, ranks, ep: held
    logits: Callable[[Tensor, int], Tensor] = lambda logits, ranks: logits


def _repeated(tensor: Tensor, ranks: int, dim: int) -> Tensor:
    """The first rank's part in the place of every rank's."""
    first = tensor.tensor_split(ranks, dim)[0]
    return torch.cat([first] * ranks, dim) if first.shape[dim] * ranks == tensor.shape[dim] else tensor


def _first_rows(held: dict[str, Tensor], ranks: int, ep: bool) -> dict[str, Tensor]:
    """Rows of the projections that are cut by rows are the first rank's everywhere."""
    cut = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")
    return {
        name: _repeated(w, ranks, 0) if name.endswith(cut) and not (ep and ".experts." in name) else w
        for name, w in held.items()
    }


def _first_everywhere(held: dict[str, Tensor], ranks: int, ep: bool) -> dict[str, Tensor]:
    """Rows and columns are the first rank's everywhere; whole experts too."""
    found = _first_rows(held, ranks, ep)
    for name, weight in held.items():
        if name.endswith(LAST) and not (ep and ".experts." in name):
            found[name] = _repeated(weight, ranks, 1)
    return _first_experts(found, ranks, ep) if ep else found


def _first_experts(held: dict[str, Tensor], ranks: int, ep: bool) -> dict[str, Tensor]:
    """Every rank holds the experts of the first one under the names of its own."""
    experts = 1 + max((int(n.split(".experts.")[1].split(".")[0]) for n in held if ".experts." in n), default=-1)
    if not ep or not experts or experts % ranks:
        return held
    found = dict(held)
    for name in (name for name in held if ".experts." in name):
        before, _, after = name.partition(".experts.")
        number, _, rest = after.partition(".")
        found[name] = held[f"{before}.experts.{int(number) % (experts // ranks)}.{rest}"]
    return found


def _shards_as_rows(logits: Tensor, ranks: int) -> Tensor:
    """Gathered shards [R, T, V / R] read as [T, V]: right for one token only."""
    batch, length, vocabulary = logits.shape
    shards = logits.reshape(batch * length, ranks, -1).transpose(0, 1)
    return shards.reshape(batch, length, vocabulary)


def _first_shard(logits: Tensor, ranks: int) -> Tensor:
    """Every rank has computed the first one's columns."""
    return _repeated(logits, ranks, -1)


def _last_shard_first(logits: Tensor, ranks: int) -> Tensor:
    return torch.cat(logits.tensor_split(ranks, -1)[::-1], -1)


MISTAKES = (
    Mistake("the sum over ranks after attention is left out", attention=alone),
    Mistake("the sum over ranks after the experts is left out", mlp=alone),
    Mistake("no sum over ranks after attention and experts", attention=alone, mlp=alone),
    Mistake("attention is summed over ranks twice", attention=twice),
    Mistake("the experts are summed over ranks twice", mlp=twice),
    Mistake("attention and experts are summed over ranks twice", attention=twice, mlp=twice),
    Mistake("attention is averaged over ranks, not summed", attention=averaged),
    Mistake("the experts are averaged over ranks, not summed", mlp=averaged),
    Mistake("the whole shared expert is counted once per rank", shared_whole=True),
    Mistake("routers choose apart: of equal experts each rank takes its own", prefers=1e-9),
    Mistake("routers choose apart: of equal experts each rank takes another's", prefers=-1e-9),
    Mistake("every rank holds the first rank's shard", weights=_first_everywhere),
    Mistake("every rank holds the first rank's shard", weights=_first_everywhere, logits=_first_shard),
    Mistake("every rank holds the first rank's rows of projections cut by rows", weights=_first_rows),
    Mistake("every rank holds the first rank's experts", weights=_first_experts),
    Mistake("gathered shards of the logits are put together token by token, right for one", logits=_shards_as_rows),
    Mistake("gathered shards of the logits are in another order than the ranks", logits=_last_shard_first),
)  # fmt: skip


def causes(question: Question, got: Tensor, rank: int, ranks: int, ep: bool) -> list[dict[str, str]]:
    """The mistakes whose logits [B, L, V] are what this rank has returned, within rounding."""
    bound = question.bound
    if bound is None or ranks == 1:
        return []
    far, found = _distance(got, bound.value, bound.sigma), {}
    for mistake, value in _mistaken(question, rank, ranks, ep):
        near = _distance(got, value, bound.sigma)
        if near <= bounds.max_limit() < far:
            found[mistake.fault] = (
                f"a reference that does this is {near:.2g} sigma from what rank {rank} gave, the right one {far:.2g}"
            )
    return [{"fault": fault, "evidence": evidence} for fault, evidence in found.items()]


def _mistaken(question: Question, rank: int, ranks: int, ep: bool) -> Iterator[tuple[Mistake, Tensor]]:
    """What a rank would return: with the whole head on its own stream, and with a shard of each rank's."""
    keys, weights = question.keys, {name: weight.double() for name, weight in question.weights.items()}
    for mistake in MISTAKES:
        held = mistake.weights(dict(weights), ranks, ep)
        logits = _run(keys, held, question.ids, ranks, ep, mistake)
        yield mistake, mistake.logits(logits[rank], ranks)
        shards = [own.tensor_split(ranks, -1)[r] for r, own in enumerate(logits)]
        yield mistake, mistake.logits(torch.cat(shards, -1), ranks)


def _run(
    keys: dict[str, Any], held: dict[str, Tensor], ids: Tensor, ranks: int, ep: bool, mistake: Mistake
) -> list[Tensor]:
    """Each rank's logits [B, L, V]."""
    parts = [Model(keys, _part(held, r, ranks, ep, mistake)) for r in range(ranks)]
    streams = [parts[0].embed(ids)] * ranks
    for i in range(parts[0].layers):
        for half in HALVES:
            rule: Rule = getattr(mistake, half)
            added = [getattr(part, half)(i, x, State()) - x for part, x in zip(parts, streams, strict=True)]
            streams = [x + rule(r, added) for r, x in enumerate(streams)]
    return [part.logits(stream, State()) for part, stream in zip(parts, streams, strict=True)]


def _part(held: dict[str, Tensor], rank: int, ranks: int, ep: bool, mistake: Mistake) -> dict[str, Tensor]:
    """The weights of a rank, whole in shape: what others hold of the last projections is 0."""
    experts = 1 + max((int(n.split(".experts.")[1].split(".")[0]) for n in held if ".experts." in n), default=-1)
    own = torch.arange(experts).tensor_split(ranks)[rank].tolist()
    found = dict(held)
    for name, weight in held.items():
        if name.endswith("o_proj.bias") and rank:
            found[name] = torch.zeros_like(weight)
        if name.endswith("mlp.gate.weight") and mistake.prefers:
            found[name] = weight.clone()
            found[name][own] *= 1 + mistake.prefers
        if not name.endswith(LAST) or (mistake.shared_whole and ".shared_expert" in name):
            continue
        if ep and ".experts." in name:
            mine = int(name.split(".experts.")[1].split(".")[0]) in own
            found[name] = weight if mine else torch.zeros_like(weight)
        else:
            columns = torch.arange(weight.shape[1]).tensor_split(ranks)[rank]
            found[name] = torch.zeros_like(weight)
            found[name][:, columns] = weight[:, columns]
    return found


def _distance(got: Tensor, value: Tensor, sigma: Tensor) -> float:
    """|z| of the typical position: the median of the positions' rms."""
    z = (got.double() - value) / sigma
    return float(z.square().mean(-1).sqrt().nan_to_num(float("inf")).median())


def form(got: Any, question: Question, ranks: int) -> list[dict[str, str]]:
    """Why a result is not of the form that the contract has, where it is a known one."""
    vocabulary = question.keys["vocab_size"]
    if got is None:
        return [{"fault": "only some ranks have the result", "evidence": "None is what it gave here"}]
    if isinstance(got, Tensor) and got.ndim and got.shape[-1] in {-(-vocabulary // ranks), vocabulary // ranks}:
        told = f"{got.shape[-1]} columns are this rank's of {vocabulary} tokens over {ranks} ranks"
        return [{"fault": "the shards of the vocabulary are not gathered", "evidence": told}]
    return []
