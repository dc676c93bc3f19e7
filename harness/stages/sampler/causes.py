r"""Why a sampler draws wrongly: the fault whose frequencies and whose repetitions the tokens have.

Tokens are draws from random numbers of the implementation's own, so they equal those of no fault.  What a fault says of
them is told by running it with its random numbers recorded: for each row what it draws from, and which rows draw with
equal numbers.  A fault explains a call where

- every token is one that it may draw,
- rows that it draws alike have one token, and other rows no more equal ones than chance gives,
- tokens come as often as it draws them, as the judge counts,

and it is told where it explains all calls and the right distribution does not.  Of several the likeliest comes first:
the sum of log p over the rows that draw with numbers of their own.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import inf, log
from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core.call import Call
from moe_harness.harness.core.case import Case
from moe_harness.harness.core.catalogue import Fault, all_faults
from moe_harness.harness.core.invocation import Broken, Rejected, Trial
from moe_harness.harness.core.own_time import own_time
from moe_harness.harness.diagnosis.candidates import in_every_form, suspects
from moe_harness.harness.diagnosis.datasets import probes
from moe_harness.harness.stages.sampler.bound import count_headroom, spread_headroom
from moe_harness.harness.stages.sampler.cases import SamplerCase
from moe_harness.harness.stages.sampler.faults._steps import Steps, choose, mixed
from moe_harness.harness.stages.sampler.laws import _with_rows
from moe_harness.harness.stages.sampler.stage import FEW_KINDS, distribution

MOST_ROWS = 4096  # of a call that is looked at
SIMULATED = 20_000  # draws from which the frequencies of a fault are taken where its steps do not tell them
UNSEEN = 0.2 / SIMULATED  # probability of a token that never came in them
TOLD = 3
TIED = 3.0  # powers of ten between likelihoods that say nothing


@dataclass(frozen=True)
class View:
    """A call, and the tokens that were got."""

    name: str
    call: Call
    tokens: Tensor
    many: bool  # many draws from few distributions: frequencies can be counted

    @property
    def width(self) -> int:
        """That of the vocabulary, and of tokens beyond it that were got."""
        return max(self.call.args["logits"].shape[1], int(self.tokens.max()) + 1)

    def padded(self, p: Tensor) -> Tensor:
        """Zeros for tokens of which a distribution says nothing, up to the width."""
        return torch.nn.functional.pad(p, (0, max(0, self.width - p.shape[1])))


@dataclass(frozen=True)
class Prediction:
    """What a suspect says of a call."""

    p: Tensor  # [B, V] it draws from
    keys: Tensor  # int [B, 2]; rows with equal ones draw with equal random numbers
    fresh: bool = False  # no number is used twice, in no two calls either


@dataclass
class Account:
    """How a suspect fares."""

    fault: Fault
    likelihood: float = 0.0
    explained: int = 0  # calls that the right distribution does not explain
    against: bool = False  # some call contradicts it
    seen: dict[Any, int] = field(default_factory=dict)  # what has been drawn with a number, over all calls


def known() -> int:
    """How many faults are tried."""
    return len(all_faults("sampler"))


def explain(trial: Trial, case: Case, seconds: float) -> list[dict[str, str]]:
    """The faults that explain what a sampler draws, best first; [] where none does."""
    started = own_time()
    looked: list[tuple[View, Prediction, str]] = []
    wrong: list[tuple[View, Prediction, str]] = []
    seen: dict[Any, int] = {}
    for view in _views(trial, case):
        right = Prediction(view.padded(distribution(view.call)), _places(view.call))
        message = _wrong(trial, view, right, seen)
        (wrong if message else looked).append((view, right, message))
        if own_time() - started > seconds / 2:  # the rest is for the suspects
            break
    if not wrong:
        return []
    found = [Account(fault) for fault in in_every_form(suspects("sampler", trial.device, trial.subject.declared))]
    for view, right, message in [*wrong, *looked]:
        for account in found:
            prediction = None if own_time() - started > seconds else _predicted(account.fault, view)
            if prediction is not None:
                _weigh(account, view, prediction, right if message else None)
        found = [account for account in found if not account.against]
    tokens = sum(len(view.tokens) for view, _, _ in [*wrong, *looked])
    said = f"{tokens} tokens of {len(wrong) + len(looked)} calls, of which {wrong[0][0].name}: {wrong[0][2]}"
    return _told([account for account in found if account.explained], said)


def _wrong(trial: Trial, view: View, right: Prediction, seen: dict[Any, int]) -> str:
    """What a right implementation would not do, or nothing."""
    findings = trial.judge(view.call, view.tokens).findings
    if findings:
        return findings[0].message
    again = _of_their_own(seen, view, right) is None
    return "what a row draws is not what it drew before with the same seed and position" if again else ""


def _told(found: list[Account], said: str) -> list[dict[str, str]]:
    found = sorted(found, key=lambda account: -account.likelihood)
    told: list[dict[str, str]] = []
    for fault, likelihood in ((account.fault, account.likelihood) for account in found):
        if fault.name in (entry["fault"] for entry in told) or len(told) == TOLD:
            continue
        behind = (found[0].likelihood - likelihood) / log(10)
        likely = f"; {told[0]['fault']} is likelier by 10^{behind:.0f}" if told and behind > TIED else ""
        form = f" Here {fault.form}." if fault.form else ""
        told.append({"fault": fault.name, "evidence": f"{fault.consequence}{form} So it is in {said}{likely}"})
    return told


# ---------------------------------------------------------------------------------------------------------------- calls


def _views(trial: Trial, case: Case) -> Iterator[View]:
    """The failing call, the same once more and with its rows in another order, then the probes."""
    assert isinstance(case, SamplerCase)
    first = case.once().but(B=min(case.B, MOST_ROWS))
    yield from _seen(trial, "the failing call", first)
    yield from _seen(trial, "the failing call made again", first)
    yield from _seen(trial, "the failing call with its rows in reverse", first, reverse=True)
    for dataset in probes(case):
        other = dataset.cases[0]
        yield from _seen(trial, other.id(), other)
        if isinstance(other, SamplerCase) and other.vary == "grid" and other.cut == "none":
            yield from _seen(trial, f"{other.id()} with its rows in reverse", other, reverse=True)


def _seen(trial: Trial, name: str, case: Case, reverse: bool = False) -> Iterator[View]:
    try:
        call = trial.build(case)
        if reverse:
            call = _with_rows(call, torch.arange(len(call.args["logits"])).flip(0))
        tokens = trial.invoke(call).long()
    except (Rejected, Broken, RuntimeError, ValueError, IndexError):
        return
    if len(tokens) and int(tokens.min()) >= 0:
        yield View(name, call, tokens, case.data == "draws" and not reverse)


# ---------------------------------------------------------------------------------------------------------- predictions


class _Recorder:
    """Steps that note what a fault draws from and with which numbers."""

    def __init__(self) -> None:
        self.p: Tensor | None = None
        self.keys: Tensor | None = None

    def uniform(self, seeds: Tensor, positions: Tensor, count: int) -> Tensor:
        self.keys = torch.stack([seeds.long().clone(), positions.long().clone()], 1)
        return mixed(seeds, positions, count)

    def choose(self, p: Tensor, u: Tensor) -> Tensor:
        self.p = p
        return choose(p, u)


def _places(call: Call) -> Tensor:
    return torch.stack([call.keywords["seeds"].long(), call.keywords["positions"].long()], 1)


def _run(fault: Fault, call: Call, steps: Steps) -> Tensor | None:
    try:
        return fault.function(*call.args.values(), **call.keywords, steps=steps).long()
    except Exception:
        return None


def _predicted(fault: Fault, view: View) -> Prediction | None:
    """None where the fault says nothing of this call."""
    call, recorder = view.call, _Recorder()
    tokens = _run(fault, call, Steps(recorder.uniform, recorder.choose))
    if tokens is None:
        return None
    p, keys = recorder.p, recorder.keys
    again = _run(fault, call, Steps()) if keys is None else tokens
    fresh = again is None or not torch.equal(tokens, again)
    if p is None or (keys is None and not fresh):
        p = _simulated(fault, view)
    if p is None:
        return None
    p = view.padded(p / p.sum(1, keepdim=True))
    one = torch.zeros_like(p).scatter(1, tokens.clamp(0, p.shape[1] - 1)[:, None], 1.0)
    changed = (p * one).sum(1, keepdim=True) <= 0  # behind the choice, where nothing is drawn
    p = torch.where((call.keywords["temperature"] == 0)[:, None] & changed, one, p)
    return Prediction(p, _places(call) if keys is None else keys, fresh)


def _simulated(fault: Fault, view: View) -> Tensor | None:
    """Frequencies of many draws of each of the few distributions; None where every row has one of its own."""
    if not view.many:
        return None
    rows = torch.arange(FEW_KINDS).repeat(SIMULATED // FEW_KINDS * 2)
    many = _with_rows(view.call, rows)
    many.keywords["seeds"] = torch.arange(len(rows)) * 7919 + 13
    many.keywords["positions"] = torch.arange(len(rows)) // FEW_KINDS
    tokens = _run(fault, many, Steps())
    if tokens is None:
        return None
    width = max(view.width, int(tokens.max()) + 1)
    of_kind = [torch.bincount(tokens[kind::FEW_KINDS], minlength=width) for kind in range(FEW_KINDS)]
    counts = torch.stack(of_kind).double()
    p = counts / counts.sum(1, keepdim=True)
    allowed = torch.nn.functional.pad(
        distribution(view.call)[:FEW_KINDS] > 0, (0, width - view.call.args["logits"].shape[1])
    )
    p = torch.where((p == 0) & allowed, UNSEEN, p)
    return p[torch.arange(len(view.tokens)) % FEW_KINDS]


# ------------------------------------------------------------------------------------------------------------- weighing


def _weigh(account: Account, view: View, prediction: Prediction, right: Prediction | None) -> None:
    """Add a call to what is known of a suspect; `right` where the right distribution does not explain it."""
    if right is not None and torch.equal(prediction.keys, right.keys) and not prediction.fresh:
        account.against = prediction.p.shape == right.p.shape and torch.allclose(prediction.p, right.p)
    chance = prediction.p.gather(1, view.tokens[:, None])[:, 0]
    chance = torch.where(chance > 0, chance, _of_a_tie(view, prediction))
    if account.against or bool((chance <= 0).any()):
        account.against = True
        return
    own = _of_their_own(account.seen, view, prediction)
    if own is None or (view.many and _used(view, prediction, own) > 1):
        account.against = True
        return
    account.likelihood += float(chance.log()[own].sum())
    account.explained += right is not None


def _of_a_tie(view: View, prediction: Prediction) -> Tensor:
    """The probability of the least likely token that may be drawn, where the logit is as large as its."""
    logits, p = view.call.args["logits"].double(), prediction.p
    logits = torch.nn.functional.pad(logits, (0, p.shape[1] - logits.shape[1]), value=-inf)
    least, place = p.masked_fill(p <= 0, inf).min(1)
    got = logits.gather(1, view.tokens[:, None])[:, 0]
    same = got == logits.gather(1, place[:, None])[:, 0]
    return torch.where(same & (got > -inf), least, 0.0)


def _of_their_own(seen: dict[Any, int], view: View, prediction: Prediction) -> Tensor | None:
    """Bool [B], rows that are the first to draw with their number; None where an equal number gave another token."""
    own = torch.ones(len(view.tokens), dtype=torch.bool)
    if prediction.fresh:
        return own
    of_row = [row.tobytes() for row in (prediction.p * 1e6).round().int().numpy()]
    for row, key in enumerate(zip(*prediction.keys.T.tolist(), of_row, strict=True)):
        token = int(view.tokens[row])
        own[row] = key not in seen
        if seen.setdefault(key, token) != token:
            return None
    return own


def _used(view: View, prediction: Prediction, own: Tensor) -> float:
    """The largest share of a limit that the counts of a call use: of tokens, and of equal neighbours."""
    used = 0.0
    for kind in range(FEW_KINDS):
        p, of_kind = prediction.p[kind], torch.arange(len(own)) % FEW_KINDS == kind
        if float(p.max()) >= 1 - 1e-9:
            continue
        tokens = view.tokens[of_kind & own]
        counts = torch.bincount(tokens, minlength=len(p)).double()
        used = max(used, spread_headroom(counts, len(tokens), p))
        likely = p.topk(min(3, len(p))).indices.tolist()
        used = max(used, *(count_headroom(int(counts[t]), len(tokens), float(p[t])) for t in likely))
        keys = prediction.keys[of_kind & own]
        for step in (1, 16, 63):  # neighbours on the square of (seed, position): of each, and of equal sums
            apart = (keys[step:] != keys[:-step]).any(1)
            first, second = tokens[step:][apart], tokens[:-step][apart]
            equal = int((first == second).sum())
            used = max(used, count_headroom(equal, len(first), float(p.square().sum())) if len(first) else 0.0)
    return used
