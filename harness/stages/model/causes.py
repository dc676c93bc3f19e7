"""Why a model is wrong: the changed reference whose layers, logits or tokens are what was got.

    layers   every layer is within rounding of the changed one or of the right one, and some only of the changed one
    logits   all are within rounding of those of the changed model
    tokens   they are those of the changed model up to where a rounding may change one, TELLING of them or more wrong

A change is told where it explains the failing call and, where that fails too, a call of other weights and prompts.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from moe_harness.harness.core import bounds
from moe_harness.harness.core.bounds import DTYPES
from moe_harness.harness.core.case import Case
from moe_harness.harness.core.errors import CannotJudge
from moe_harness.harness.core.invocation import Broken, Rejected, Trial
from moe_harness.harness.core.own_time import own_time
from moe_harness.harness.diagnosis.plain import ADVICE, kind
from moe_harness.harness.stages.model.cases import SERVED, ModelCase
from moe_harness.harness.stages.model.changes import AROUND, IN_LAYERS
from moe_harness.harness.stages.model.noise import NoiseBound, Run, noise_bound
from moe_harness.harness.stages.model.stage import ModelCall, Question, continued, followed, prompts_of
from moe_harness.reference.model import Model, State

TOLD = 3
TELLING = 3  # tokens of 128: three that agree by chance are one in two million
AGREEING = 0.5  # of the first new tokens, before a changed model is worth a bound: some of them are uncertain
HALF = 0.5
NEAR = 16.0  # times the right model's relative noise: further away no bound is worth its dozen runs

Prompts = list[list[int]]
Sure = tuple[int, bool]


@dataclass(frozen=True)
class Suspect:
    """A change, of all layers or of one."""

    what: str
    where: int | None = None

    def model(self, right: Model) -> Model | None:
        """The model changed; None where it has nothing of the kind."""
        if self.what in PROMPTS or self.what in ANSWERS:
            return right
        try:
            changed = (AROUND | IN_LAYERS)[self.what](dict(right.config), dict(right.weights))
            return changed if self.where is None else Partly(right, changed, self.where)
        except (KeyError, ValueError, RuntimeError, IndexError):
            return None

    def told(self) -> str:
        return self.what if self.where is None else f"{self.what}, in layer {self.where} alone"


class Partly(Model):
    """`changed` in one layer, `right` in all others and around them."""

    def __init__(self, right: Model, changed: Model, where: int):
        self.right, self.changed, self.where = right, changed, where
        self.config, self.layers, self.head_dim = right.config, right.layers, right.head_dim

    def embed(self, ids: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        return self.right.embed(ids, dtype)

    def layer(self, i: int, hidden: Tensor, state: State) -> Tensor:
        return (self.changed if i == self.where else self.right).layer(i, hidden, state)

    def logits(self, hidden: Tensor, state: State) -> Tensor:
        return self.right.logits(hidden, state)


@dataclass
class ModelReply:
    """A call with what was got: layers or logits [rows, columns], tokens [B, new]."""

    case: ModelCase
    question: Question
    got: Tensor
    telling: int = TELLING

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.case.dtype]


def known() -> int:
    """How many changes are tried."""
    return len(IN_LAYERS) + len(AROUND) + len(PROMPTS) + len(ANSWERS)


@torch.no_grad()
def explain(trial: Trial, case: Case, seconds: float) -> list[dict[str, str]]:
    """What the model does instead of what it should, best first; [] where no change explains it."""
    assert isinstance(case, ModelCase)
    if case.variant in SERVED:
        return []
    end, first = own_time() + seconds, _seen(trial, case)
    if first is None:
        return []
    name, _ = kind(first.got, {})
    if name in ADVICE:
        return [{"fault": str(name), "evidence": ADVICE[str(name)]}]
    found = _explaining(first, _suspects(first), end)
    again = _seen(trial, case.resized()) if found else None
    confirmed = "" if again is None else "; so it is for other weights and prompts"
    if again is not None:
        again.telling = 1
        held = [suspect for suspect, _ in _explaining(again, [suspect for suspect, _ in found], end + seconds)]
        found = [(suspect, evidence) for suspect, evidence in found if suspect in held]
    return [{"fault": suspect.told(), "evidence": evidence + confirmed} for suspect, evidence in found[:TOLD]]


@torch.no_grad()
def of_logits(question: Question, case: ModelCase, logits: Tensor, seconds: float) -> list[dict[str, str]]:
    """What a model over ranks does instead, where its ranks do it alike, by the logits [B, L, V] of one of them."""
    reply = ModelReply(case, question, logits.flatten(0, 1))
    found = _explaining(reply, _suspects(reply), own_time() + seconds)
    return [{"fault": suspect.told(), "evidence": evidence} for suspect, evidence in found[:TOLD]]


def _seen(trial: Trial, case: ModelCase) -> ModelReply | None:
    """A call that fails; None where it passes or cannot be judged."""
    try:
        call = trial.build(case)
        got = trial.invoke(call)
        wrong = trial.judge(call, got).findings
    except (Rejected, Broken, CannotJudge, RuntimeError):
        return None
    assert isinstance(call, ModelCall) and call.question is not None
    return ModelReply(case, call.question, got.cpu()) if wrong else None


def _suspects(reply: ModelReply) -> list[Suspect]:
    everywhere = [Suspect(what) for what in IN_LAYERS]
    if reply.case.variant == "layers":
        return everywhere
    of_tokens = (*PROMPTS, *ANSWERS) if reply.case.variant == "tokens" else ()
    around = [Suspect(what) for what in (*of_tokens, *AROUND)]
    one = [Suspect(what, i) for what in IN_LAYERS for i in range(reply.question.keys["num_hidden_layers"])]
    return [*around, *everywhere, *one]


def _explaining(reply: ModelReply, suspects: list[Suspect], end: float) -> list[tuple[Suspect, str]]:
    """Those that explain a call, with the evidence; of one layer alone only what no change of all layers explains."""
    compare = {"layers": _layers, "logits": _logits, "tokens": _tokens}[reply.case.variant]
    question = reply.question
    right = Model(question.keys, {name: weight.double() for name, weight in question.weights.items()})
    found: list[tuple[Suspect, str]] = []
    for suspect in suspects:
        if own_time() > end or (suspect.where is not None and any(other.where is None for other, _ in found)):
            break
        changed = suspect.model(right)
        try:
            evidence = None if changed is None else compare(reply, suspect, changed)
        except (KeyError, RuntimeError, IndexError):  # of this family nothing is of the kind
            continue
        found += [] if evidence is None else [(suspect, evidence)]
    return found


# --------------------------------------------------------------------------------------------------- layers and logits


def _layers(reply: ModelReply, suspect: Suspect, changed: Model) -> str | None:
    question, bound = reply.question, reply.question.bound
    assert bound is not None
    count, batch = len(question.streams), len(question.ids)
    got = reply.got.view(count, batch, reply.case.L, -1)
    wrong, near, far = [], 0.0, 0.0
    for i, stream in enumerate(question.streams):
        here = slice(i * batch, (i + 1) * batch)
        own = NoiseBound(bound.value[here], bound.sigma[here], bound.routed[here])
        right = _worst(own, got[i])
        if right <= bounds.max_limit():
            continue
        z = _worst_of(partial(changed.layer, i), stream.double(), changed, own, reply, got[i])
        if z is None:
            return None
        wrong.append(i)
        near, far = max(near, z), max(far, right)
    where = "" if len(wrong) == count else f" in layer {', '.join(map(str, wrong))}, where"
    return f"{where} {_sigmas(near, far)}".strip() if wrong else None


def _logits(reply: ModelReply, suspect: Suspect, changed: Model) -> str | None:
    bound = reply.question.bound
    assert bound is not None
    got = reply.got.view(bound.value.shape)
    z = _worst_of(changed, reply.question.ids, changed, bound, reply, got)
    return None if z is None else _sigmas(z, _worst(bound, got))


def _sigmas(near: float, far: float) -> str:
    return f"a reference that does this is at most {near:.2g} sigma from what was got, the right one {far:.3g}"


def _worst_of(
    run: Run, given: Tensor, changed: Model, right: NoiseBound, reply: ModelReply, got: Tensor
) -> float | None:
    """The largest |z| from a changed computation; None where it is not within rounding of that.

    Positions whose routing a rounding may change may differ, as long as HALF of all do not.
    """
    value, noise = run(given, State()), right.sigma.square().mean() / right.value.square().mean()
    if not (got.double() - value).square().mean() <= NEAR**2 * noise * value.square().mean():
        return None
    bound = noise_bound(changed, run, given, reply.dtype)
    z = bound.z(got).abs().nan_to_num(float("inf")).amax(-1)
    within = z <= bounds.max_limit()
    if bool((bound.routed & ~within).any()) or within.double().mean() < HALF:
        return None
    return float(z[within].max())


def _worst(bound: NoiseBound, got: Tensor) -> float:
    return float(bound.z(got)[bound.routed].abs().nan_to_num(float("inf")).max())


# -------------------------------------------------------------------------------------------------------------- tokens


def _padded_left(prompts: Prompts) -> Prompts:
    longest = max(map(len, prompts))
    return [[0] * (longest - len(prompt)) + prompt for prompt in prompts]


def _padded_right(prompts: Prompts) -> Prompts:
    longest = max(map(len, prompts))
    return [prompt + [0] * (longest - len(prompt)) for prompt in prompts]


PROMPTS: dict[str, Callable[[Prompts], Prompts]] = {
    "the first token of a prompt is lost": lambda prompts: [prompt[1:] or prompt for prompt in prompts],
    "the last token of a prompt is lost": lambda prompts: [prompt[:-1] or prompt for prompt in prompts],
    "the last token of a prompt is read twice": lambda prompts: [[*prompt, prompt[-1]] for prompt in prompts],
    "shorter prompts are padded on the left with token 0, which is seen": _padded_left,
    "shorter prompts are padded on the right with token 0, which is seen": _padded_right,
    "answers are in the reverse order of the prompts": lambda prompts: prompts[::-1],
    "every prompt gets the answer of the first": lambda prompts: [prompts[0]] * len(prompts),
}
# Of a prompt and what should come behind it; a token goes with whether no permitted rounding changes it.
ANSWERS: dict[str, Callable[[list[Sure], list[Sure]], list[Sure]]] = {
    "the first new token is left out": lambda prompt, tokens: tokens[1:],
    "the last token of the prompt comes first": lambda prompt, tokens: [prompt[-1], *tokens[:-1]],
    "every token comes twice": lambda prompt, tokens: [token for token in tokens for _ in range(2)][: len(tokens)],
}


def _tokens(reply: ModelReply, suspect: Suspect, changed: Model) -> str | None:
    due = reply.question.tokens
    assert due is not None
    asked = PROMPTS.get(suspect.what, lambda prompts: prompts)(prompts_of(reply.question.ids))
    if suspect.what not in ANSWERS and not _begin_alike(changed, asked, reply.got):
        return None
    for bounded in (False, True):  # a bound takes a dozen runs: first whether it is worth them
        agreeing = telling = 0
        for place, said in _said(reply, suspect, changed, asked, bounded):
            alike = _alike(said, reply.got[place].tolist())
            if alike is None:
                return None
            agreeing += alike
            telling += int((reply.got[place, :alike] != due[place, :alike]).sum())
        if telling < reply.telling:
            return None
    return (
        f"{agreeing} of {reply.got.numel()} tokens are those of a reference that does this, up to where a rounding may "
        f"change one; {telling} of them are wrong, of {int((reply.got != due).sum())} that are wrong in all"
    )


def _said(
    reply: ModelReply, suspect: Suspect, changed: Model, asked: Prompts, bounded: bool
) -> Iterator[tuple[int, list[Sure]]]:
    """Of each prompt its place and the tokens that the changed model says; none is certain where not `bounded`."""
    prompts, new = prompts_of(reply.question.ids), reply.case.new
    answer = ANSWERS.get(suspect.what, lambda prompt, tokens: tokens)
    for places, rows in _of_one_length(asked):
        found = followed(changed, rows, new)[:, -new:]
        sure = continued(reply.case, changed, rows)[1] if bounded else torch.zeros_like(found, dtype=torch.bool)
        for place, tokens, certain in zip(places, found.tolist(), sure.tolist(), strict=True):
            given = [(token, True) for token in prompts[place]]
            yield place, answer(given, list(zip(tokens, certain, strict=True)))


def _alike(said: list[Sure], got: list[int]) -> int | None:
    """How many tokens are the same before the first that is not; None where that one is certain."""
    for place, ((token, sure), other) in enumerate(zip(said, got, strict=False)):
        if token != other:
            return None if sure else place
    return min(len(said), len(got))


def _begin_alike(changed: Model, prompts: Prompts, got: Tensor) -> bool:
    """Whether most first tokens are the changed model's: a bound of its logits takes a dozen runs.

    Of the commonest length, as each takes a run and there are a hundred changes to try.
    """
    places, rows = max(_of_one_length(prompts), key=lambda group: len(group[0]))
    alike = changed(rows)[:, -1].argmax(-1) == got[places, 0]
    return float(alike.double().mean()) >= AGREEING


def _of_one_length(prompts: Prompts) -> Iterator[tuple[list[int], Tensor]]:
    """Places and ids [N, L] of the prompts of each length."""
    for length in sorted(set(map(len, prompts))):
        places = [place for place, prompt in enumerate(prompts) if len(prompt) == length]
        yield places, torch.tensor([prompts[place] for place in places])
