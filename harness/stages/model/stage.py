"""The stage `model`: tiny checkpoints on disk, and the bounds of logits, layers and tokens.

The verdict does not hang on luck: routers are decisive (`checkpoints.tensors`), and of many random prompts those are
continued whose largest logits stay ahead longest.  The share that is judged is part of what the run tells, and a case
of which less than FLOOR can be judged is an error of the harness, never a pass.
"""

import tempfile
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_harness.fixtures import checkpoints
from moe_harness.harness.core import bounds
from moe_harness.harness.core.blame import hand_over
from moe_harness.harness.core.bounds import DTYPES
from moe_harness.harness.core.call import Call
from moe_harness.harness.core.contracts import Subject
from moe_harness.harness.core.errors import CannotJudge
from moe_harness.harness.core.findings import Record
from moe_harness.harness.core.invocation import Broken, Rejected
from moe_harness.harness.core.stage import Declared, Output, Stage, Truths
from moe_harness.harness.stages.model import served
from moe_harness.harness.stages.model.cases import SERVED, ModelCase
from moe_harness.harness.stages.model.noise import RUNS, NoiseBound, logit_bound, noise_bound
from moe_harness.harness.stages.model.served import Draws, Served
from moe_harness.reference.model import Model, State

CANDIDATES = 4  # random prompts for each that is asked
OF_LONG = 2  # ... of more than LONG tokens, whose bound takes seconds
ROUNDS = 4  # of so many candidates, as long as less than PLENTY of the tokens are certain
PLENTY = 0.8
FEW_RUNS = 3  # enough to choose among them
LONG = 100
LENGTHS = 3  # of the prompts of one call
FLOOR = 0.5  # of the positions, that at least are judged


@dataclass
class Question:
    """What is asked of a model, and what is right."""

    keys: dict[str, Any]
    weights: dict[str, Tensor]
    ids: Tensor  # [B, L]; the prompts of "tokens"
    bound: NoiseBound | None  # of logits, or of all layers one below the other [layers * B, L, H]
    streams: list[Tensor] = field(default_factory=list)  # what enters each layer
    tokens: Tensor | None = None  # [B, new], right ones
    certain: Tensor | None = None  # [B, new], of those
    served: Served | None = None  # calls of `generate` beside the plain one


@dataclass
class ModelCall(Call):
    """A call of `load_model`, and what the loaded model is asked then."""

    question: Question | None = None
    folder: Any = None  # kept while the call lives


class WholeModel(Stage):
    """A whole decoder."""

    def build(self, case: ModelCase, device: str) -> Call:
        question, folder = ask(case), tempfile.TemporaryDirectory(prefix="moe_harness_model_")
        checkpoints.write(Path(folder.name), question.keys, question.weights, case.shards)
        keywords = {"device": device, "dtype": DTYPES[case.dtype]}
        return ModelCall(case, {"model_dir": folder.name}, keywords, question=question, folder=folder)

    def run(self, subject: Subject, call: Call) -> Any:
        """Load, then ask."""
        model, question, device = subject.call(call.args, call.keywords), _question(call), call.keywords["device"]
        if lacking := what_lacks(model, call.case.variant):
            raise Broken(lacking)
        if call.case.variant == "logits":
            return _flat("model(input_ids)", hand_over(model, question.ids.to(device)), question)
        if call.case.variant == "layers":
            if not hasattr(model, "layer"):
                raise Rejected("the model has no method `layer`")
            found = [hand_over(model.layer, i, stream.to(device)) for i, stream in enumerate(question.streams)]
            return _flat("model.layer(i, hidden_states)", torch.cat(found), question)
        if question.served is not None:
            return served.call(model, question.served, _case(call).new).to(device)
        prompts = prompts_of(question.ids)
        generated = hand_over(model.generate, prompts, max_new_tokens=_case(call).new, ignore_eos=True)
        lengths = [len(tokens) for tokens in generated]
        if lengths != [_case(call).new] * len(prompts):
            raise Broken(f"generate gave {lengths} tokens, wanted {_case(call).new} for each of {len(prompts)}")
        return torch.tensor(generated, device=device)

    def outputs(self, call: Call) -> list[Output]:
        question, case = _question(call), _case(call)
        if question.bound is None:
            rows = len(question.ids) if question.served is None else question.served.rows()
            return [Output("the tokens", (rows, case.new), torch.int64)]
        assert question.bound is not None
        dtype = DTYPES[case.dtype]
        name, wide = ("the logits", (dtype, torch.float32)) if case.variant == "logits" else ("the layers", (dtype,))
        return [Output(name, tuple(question.bound.value.flatten(0, 1).shape), wide)]

    def expect(self, call: Call, declared: Declared) -> Truths | None:
        """Within a bound, or tokens."""
        question = _question(call)
        if question.bound is None:
            return question.tokens
        bound = question.bound.bound(question.keys["hidden_size"])
        device = call.keywords["device"]
        value, variance, shared = (
            part.flatten(0, 1).to(device) for part in (bound.value, bound.variance, bound.shared)
        )
        return bounds.Bound(value, variance, shared, bound.sources.to(device))

    def judge(self, call: Call, result: Any, declared: Declared) -> Record:
        question = _question(call)
        if question.served is not None:
            return served.judge(question.served, result.cpu())
        if question.tokens is None or question.certain is None:
            record = super().judge(call, result, declared)
            assert question.bound is not None
            share = float(question.bound.routed.double().mean())
        else:
            record = _judge_tokens(question, result.cpu())
            share = float(question.certain.double().mean())
        record.observations["share judged"] = f"{int(10 * share + 1e-9) * 10} %" + (" or more" if share < 1 else "")
        return record

    def place_of(self, call: Call, row: int, column: int) -> dict[str, Any]:
        length, batch = _case(call).L, len(_question(call).ids)
        if call.case.variant != "layers":
            return {"prompt": row // length, "position": row % length, "token": column}
        layer, rest = divmod(row, batch * length)
        return {"layer": layer, "prompt": rest // length, "position": rest % length, "column": column}

    def row_groups(self, call: Call) -> dict[str, Tensor]:
        if call.case.variant != "layers":
            return {}
        rows = len(_question(call).ids) * _case(call).L
        layers = torch.arange(len(_question(call).streams) * rows) // rows
        return {f"layer {i}": layers == i for i in range(len(_question(call).streams))}

    def telling_rows(self, call: Call) -> Tensor:
        bound = _question(call).bound
        return torch.arange(_case(call).B) if bound is None else bound.routed.flatten().nonzero()[:, 0]


STAGE = WholeModel()


def what_lacks(model: Any, variant: str) -> str | None:
    """Why what load_model gave cannot be asked at all, in words; None where it can."""
    if variant in ("tokens", "drawn", *SERVED) and not callable(getattr(model, "generate", None)):
        return f"load_model gave {type(model).__name__}, which has no method generate(prompts, *, max_new_tokens, ...)"
    if variant == "logits" and not callable(model):
        return f"load_model gave {type(model).__name__}, which cannot be called: model(input_ids) gives the logits"
    return None


def _flat(what: str, result: Any, question: Question) -> Any:
    """[B, L, columns] as [B * L, columns]."""
    assert question.bound is not None
    wanted = tuple(question.bound.value.shape)
    shape = tuple(getattr(result, "shape", ()))
    if shape != wanted:
        raise Broken(f"{what} gave {type(result).__name__} of the shape {list(shape)}, wanted {list(wanted)}")
    return result.flatten(0, 1)


def _case(call: Call) -> ModelCase:
    assert isinstance(call.case, ModelCase)
    return call.case


def _question(call: Call) -> Question:
    assert isinstance(call, ModelCall) and call.question is not None
    return call.question


def prompts_of(ids: Tensor) -> list[list[int]]:
    """Prompts of several lengths: the rows, without the first token or the first two at some places."""
    return [row[min(place % LENGTHS, len(row) - 1) :].tolist() for place, row in enumerate(ids)]


@lru_cache(maxsize=8)
@torch.no_grad()
def ask(case: ModelCase) -> Question:
    """The checkpoint of a case, its question and the right answers; CannotJudge where too little can be judged."""
    changes: dict[str, Any] = {"tie_word_embeddings": case.tied, "rope_theta": case.theta, "num_hidden_layers": 2}
    if case.family != "qwen3" and not case.family.startswith("deepseek"):  # no released DeepSeek-V2 renormalises
        changes["norm_topk_prob"] = case.renormalize
    if case.twins:
        changes["num_experts_per_tok"] = 3
    keys = checkpoints.config(case.family, **changes) | {"torch_dtype": str(DTYPES[case.dtype]).removeprefix("torch.")}
    weights = checkpoints.tensors(keys, case.seed, DTYPES[case.dtype], decisive=True)
    if case.twins:
        checkpoints.pair_experts(weights, keys)
    model = Model(keys, {name: weight.double() for name, weight in weights.items()})  # once, not in every run
    draw = torch.Generator().manual_seed(case.seed + 7)
    ids = torch.randint(0, keys["vocab_size"], (ROUNDS * _candidates(case) * case.B, case.L), generator=draw)
    make = {"logits": _logits, "layers": _layers, "drawn": _drawn, "temperature": _temperature}
    question = make.get(case.variant, _tokens)(case, model, ids)
    if case.variant in ("counts", "stops", "again"):
        assert question.tokens is not None and question.certain is not None
        rows = (prompts_of(question.ids), question.tokens.tolist(), question.certain.tolist())
        question.served = served.served(case.variant, *rows)
        question.served.asks += _tails(case, model, rows[0]) if case.variant == "again" else []
        keys |= {} if question.served.eos is None else {"eos_token_id": question.served.eos}
    question.keys, question.weights = keys, weights
    return question


def _candidates(case: ModelCase) -> int:
    return OF_LONG if case.L > LONG else CANDIDATES


def _logits(case: ModelCase, model: Model, ids: Tensor) -> Question:
    ids = ids[: case.B]
    forced = None
    if case.twins:  # whichever twin is chosen, the values are these
        state = State()
        model(ids, state)
        forced = {layer: (weights, chosen) for layer, (_, weights, chosen) in state.routed.items()}
    bound = logit_bound(model, ids, DTYPES[case.dtype], forced)
    return _enough(Question(model.config, {}, ids, bound), bound.routed)


def _drawn(case: ModelCase, model: Model, ids: Tensor) -> Question:
    """Prompts alone: which tokens are drawn is the implementation's, that they are the same on all ranks is not."""
    return Question(model.config, {}, ids[: case.B], None)


def _temperature(case: ModelCase, model: Model, ids: Tensor) -> Question:
    """Draws after the prompts; roundings of the logits are nothing beside the chance of so few."""
    ids = ids[: case.B]
    log_p = (model(ids)[:, -1] / served.HEAT).log_softmax(-1)
    return Question(model.config, {}, ids, None, served=Served(draws=Draws(ids.tolist(), log_p)))


def _layers(case: ModelCase, model: Model, ids: Tensor) -> Question:
    """Each layer on the stream that the reference gives it, rounded to the dtype."""
    dtype, ids = DTYPES[case.dtype], ids[: case.B]
    state, found, streams = State(), [], []
    hidden = model.embed(ids)
    for i in range(model.layers):
        streams.append(hidden.to(dtype))
        found.append(noise_bound(model, partial(model.layer, i), streams[-1].double(), dtype))
        hidden = model.layer(i, hidden, state)
    bound = NoiseBound(*(torch.cat([getattr(one, part) for one in found]) for part in ("value", "sigma", "routed")))
    return _enough(Question(model.config, {}, ids, bound, streams), bound.routed)


def _tokens(case: ModelCase, model: Model, ids: Tensor) -> Question:
    """Greedy tokens of the reference; certain up to where a rounding could change one, or a routing before it.

    For each place the candidate is taken whose tokens stay certain longest; those of the first round are enough but for
    dense models in bf16, of which little more than FLOOR could be judged.
    """
    rows = ids.view(-1, case.B, case.L)
    if case.variant == "again":  # prompts of one length begin alike
        rows[:, :, : case.L // 2] = rows[0, 0, : case.L // 2]
    chosen = torch.empty(case.B, case.L, dtype=torch.int64)
    tokens, certain = torch.zeros(case.B, case.new, dtype=torch.int64), torch.zeros(case.B, case.new, dtype=torch.bool)
    for candidates in rows.split(_candidates(case)):
        left = (~certain.all(-1)).nonzero()[:, 0]
        for here in (left[left % LENGTHS == shortened] for shortened in range(LENGTHS)):
            if len(here):
                found, sure, best = _best(case, model, candidates[:, here, min(int(here[0]) % LENGTHS, case.L - 1) :])
                better = sure.sum(-1) >= certain[here].sum(-1)
                at = here[better]
                tokens[at], certain[at] = found[better], sure[better]
                chosen[at] = candidates[best, here][better]
        if float(certain.double().mean()) >= PLENTY:
            break
    question = Question(model.config, {}, chosen, None, tokens=tokens, certain=certain)
    return _enough(question, certain)


def _best(case: ModelCase, model: Model, candidates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of prompts [N, B, L] the best for each place: new tokens, which are certain, both [B, new], and its number."""
    rows = followed(model, candidates.flatten(0, 1), case.new)
    likely = certain_of(case, model, rows, runs=FEW_RUNS).view(*candidates.shape[:2], case.new)
    best = likely.sum(-1).argmax(0)
    rows = rows.view(*candidates.shape[:2], -1)[best, torch.arange(len(best))]
    return rows[:, -case.new :], certain_of(case, model, rows), best


def _tails(case: ModelCase, model: Model, prompts: list[list[int]]) -> list[served.Ask]:
    """What came behind the first page of earlier prompts, as prompts: the same tokens at other positions."""
    tails = [prompt[served.PAGE :] for prompt in prompts if len(prompt) > served.PAGE]
    found = [continued(case, model, torch.tensor([tail])) for tail in tails]
    options = {"max_new_tokens": case.new, "ignore_eos": True}
    tokens, certain = ([pair[part][0].tolist() for pair in found] for part in (0, 1))
    return [served.Ask(tails, options, tokens, certain, what="the end of an earlier one alone")] if tails else []


def followed(model: Model, prompts: Tensor, new: int) -> Tensor:
    """Prompts [N, L] with greedy tokens behind them: [N, L + new]."""
    state, row = State(), prompts
    last = model(prompts, state)[:, -1:]
    for place in range(new):
        row = torch.cat((row, last.argmax(-1)), dim=1)
        if place + 1 < new:
            last = model(row[:, -1:], state)
    return row


def continued(case: ModelCase, model: Model, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """Greedy tokens [N, new] after prompts [N, L], and which of them are certain."""
    row = followed(model, prompts, case.new)
    return row[:, -case.new :], certain_of(case, model, row)


def certain_of(case: ModelCase, model: Model, row: Tensor, runs: int = RUNS) -> Tensor:
    """Of greedy tokens at the end of rows [N, L + new] those, [N, new], that no permitted rounding changes."""
    bound = logit_bound(model, row[:, :-1], DTYPES[case.dtype], runs=runs)
    sure = bound.routed & bound.decided()
    return sure[:, -case.new :].long().cumprod(-1).bool()


def _enough(question: Question, judged: Tensor) -> Question:
    share = float(judged.double().mean())
    if share < FLOOR:
        raise CannotJudge(f"only {share:.0%} of the positions could be judged, wanted at least {FLOOR:.0%}")
    return question


def _judge_tokens(question: Question, result: Tensor) -> Record:
    """Tokens equal the reference's up to the first that a rounding could change."""
    assert question.tokens is not None and question.certain is not None
    record = Record(elements=int(question.certain.sum()))
    wrong = (result != question.tokens) & question.certain
    if bool(wrong.any()):
        row, place = (int(i) for i in wrong.nonzero()[0])
        got, wanted = int(result[row, place]), int(question.tokens[row, place])
        record.fail(
            f"new token {place} of prompt {row} is {got}, but should be {wanted}: no permitted rounding changes it "
            f"({int(wrong.sum())} of {record.elements} tokens differ)",
            headroom=float("inf"), where={"prompt": row, "new token": place},
        )  # fmt: skip
    return record
