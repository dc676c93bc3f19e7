"""What `generate` promises beside the greedy tokens of one batch.

    counts       max_new_tokens is a list, a number for each prompt
    stops        it ends at stop_token_ids, and at the config's end of sequence unless that is to be ignored
    again        prompts that begin alike: each twice in one call, then once more, then with new tokens behind them,
                 and their ends alone
    temperature  its draws are those of softmax(logits / temperature), and a seed draws the same again

A result is the tokens of all calls, one below the other: int64 [rows, new], -1 behind the last one of a row.  Whether
the token at which a row ends is part of it, the contract leaves open.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core import bounds
from moe_harness.harness.core.blame import hand_over
from moe_harness.harness.core.findings import Record
from moe_harness.harness.core.invocation import Broken

NOTHING = -1
PAGE = 16  # tokens of a page of most engines, and a multiple of the others'
SEEDS = 64  # calls that draw, each with a seed of its own
HEAT = 8.0  # a distribution so flat that a cut to its likelier half shows


@dataclass
class Ask:
    """One call of `generate`, and what it has to give: greedy tokens, which of them are certain, ids that end a row."""

    prompts: list[list[int]]
    options: dict[str, Any]
    tokens: list[list[int]]
    certain: list[list[bool]]
    ends: tuple[int, ...] = ()
    what: str = ""

    def counts(self) -> list[int]:
        """Tokens asked for of each prompt."""
        return _counts(self.prompts, self.options)


@dataclass
class Draws:
    """Calls with SEEDS seeds, and the first one's once more; log p [B, V] of the right distribution."""

    prompts: list[list[int]]
    log_p: Tensor


@dataclass
class Served:
    """All calls of a case, one after the other on one model."""

    asks: list[Ask] = field(default_factory=list)
    draws: Draws | None = None
    eos: int | None = None  # what the checkpoint's config has to say

    def rows(self) -> int:
        """Rows of the result."""
        drawn = 0 if self.draws is None else (SEEDS + 1) * len(self.draws.prompts)
        return drawn + sum(len(ask.prompts) for ask in self.asks)


# ------------------------------------------------------------------------------------------------------------ the calls


def served(variant: str, prompts: list[list[int]], tokens: list[list[int]], certain: list[list[bool]]) -> Served:
    """The calls of a variant about prompts whose greedy tokens are these."""
    new = len(tokens[0])
    if variant == "counts":
        counts = [1 + (3 * place) % new for place in range(len(prompts))]
        return Served([Ask(prompts, {"max_new_tokens": counts, "ignore_eos": True}, tokens, certain)])
    if variant == "stops":
        return _stops(prompts, tokens, certain, new)
    return Served(list(_again(prompts, tokens, certain, new)))


def _stops(prompts: list[list[int]], tokens: list[list[int]], certain: list[list[bool]], new: int) -> Served:
    """Ids taken from the rows' own tokens, so that some rows end early and others do not."""
    ids = [tokens[place][(place + 1) % new] for place in range(len(tokens))]
    first, second, eos = ids[0], ids[1], ids[2]
    length, deaf = {"max_new_tokens": new}, {"max_new_tokens": new, "ignore_eos": True}
    return Served([
        Ask(prompts, deaf, tokens, certain),
        Ask(prompts, deaf | {"stop_token_ids": (first, second)}, tokens, certain, (first, second)),
        Ask(prompts, length, tokens, certain, (eos,)),
        Ask(prompts, length | {"stop_token_ids": (first,)}, tokens, certain, (first, eos)),
    ], eos=eos)  # fmt: skip


def _again(prompts: list[list[int]], tokens: list[list[int]], certain: list[list[bool]], new: int) -> Iterator[Ask]:
    options = {"max_new_tokens": new, "ignore_eos": True}
    twice = [place for place in reversed(range(len(prompts))) for _ in range(2)]
    yield Ask(
        [prompts[place] for place in twice], options, [tokens[place] for place in twice],
        [certain[place] for place in twice], what="each prompt twice in one call",
    )  # fmt: skip
    yield Ask(prompts, options, tokens, certain, what="asked again")
    longer = [[*prompt, *row[:2]] for prompt, row in zip(prompts, tokens, strict=True)]
    rest = [[sure[1] and here for here in sure[2:]] for sure in certain]
    shorter = {"max_new_tokens": new - 2, "ignore_eos": True}
    yield Ask(longer, shorter, [row[2:] for row in tokens], rest, what="with two of their tokens behind them")


def call(model: Any, calls: Served, new: int) -> Tensor:
    """What the model answers.

    Raises:
        Broken: something else than a list of tokens for every prompt, a prompt that was written into.
    """
    rows: list[list[int]] = []
    for ask in calls.asks:
        rows += _generated(model, ask.prompts, ask.options, ask.what)
    if calls.draws is not None:
        for seed in (*range(SEEDS), 0):
            options = {"max_new_tokens": 1, "temperature": HEAT, "seed": seed, "ignore_eos": True}
            rows += _generated(model, calls.draws.prompts, options, f"with seed {seed}")
    return torch.tensor([(row + [NOTHING] * new)[:new] for row in rows])


def _counts(prompts: list[list[int]], options: dict[str, Any]) -> list[int]:
    count = options["max_new_tokens"]
    return [count] * len(prompts) if isinstance(count, int) else count


def _generated(model: Any, prompts: list[list[int]], options: dict[str, Any], what: str) -> list[list[int]]:
    given = [list(prompt) for prompt in prompts]
    found = hand_over(model.generate, given, **options)
    told = f"generate({len(prompts)} prompts, {', '.join(f'{key}={value}' for key, value in options.items())})"
    if given != prompts:
        raise Broken(f"{told} has written into the prompts")
    try:
        rows = [[int(token) for token in row] for row in found]
    except (TypeError, ValueError):
        raise Broken(f"{told} gave {type(found).__name__}, wanted a list of tokens for each prompt") from None
    if len(rows) != len(prompts):
        raise Broken(f"{told} gave {len(rows)} lists, wanted one for each prompt")
    for place, (row, count) in enumerate(zip(rows, _counts(prompts, options), strict=True)):
        if len(row) > count:
            where = f" ({what})" if what else ""
            raise Broken(f"{told} gave {len(row)} tokens for prompt {place}, wanted at most {count}{where}")
    return rows


# -------------------------------------------------------------------------------------------------------------- judging


def judge(calls: Served, result: Tensor) -> Record:
    """Every row against what its call has to give."""
    record, at = Record(), 0
    for number, ask in enumerate(calls.asks):
        for place, count in enumerate(ask.counts()):
            got = [token for token in result[at].tolist() if token != NOTHING]
            wrong = _wrong(got, ask.tokens[place][:count], ask.certain[place][:count], ask.ends)
            record.elements += sum(ask.certain[place][:count])
            if wrong and not record.findings:
                what = f", {ask.what}" if ask.what else ""
                options = {key: value for key, value in ask.options.items() if value is not False}
                asked = ", ".join(f"{key}={value}" for key, value in options.items())
                where = {"call": number, "prompt": place}
                record.fail(
                    f"prompt {place}{what}: {wrong} (generate with {asked})", headroom=float("inf"), where=where
                )
            at += 1
    if calls.draws is not None:
        _judge_draws(calls.draws, result[at:, 0], record)
    return record


def _wrong(got: list[int], due: Sequence[int], certain: Sequence[bool], ends: tuple[int, ...]) -> str | None:
    """What is wrong with a row, as far as what it should be is certain."""
    for place, (token, sure) in enumerate(zip(due, certain, strict=True)):
        if not sure:
            return None
        if token in ends:
            if len(got) > place + 1:
                return f"goes on with {got[place + 1]} behind token {token}, new token {place}, at which it should end"
            return None if got[place:] in ([], [token]) else f"new token {place} is {got[place]}, should be {token}"
        if place == len(got):
            return f"ends after {place} new tokens, but should go on with {token}, which is no end"
        if got[place] != token:
            return f"new token {place} is {got[place]}, should be {token}: no permitted rounding changes it"
    return None


def _judge_draws(draws: Draws, tokens: Tensor, record: Record) -> None:
    """By the sum of log p over the prompts of a call, which has the same distribution for every seed.

    How the prompts of one call hang together is the implementation's; calls do not, so their spread tells the error.
    """
    prompts, vocabulary = draws.log_p.shape
    record.elements += tokens.numel()
    if bool((tokens < 0).any() | (tokens >= vocabulary).any()):
        record.fail(f"temperature={HEAT}: drawn tokens are not all within 0..{vocabulary - 1}", headroom=float("inf"))
        return
    by_seed = tokens.view(SEEDS + 1, prompts)
    first, again = by_seed[0], by_seed[-1]
    if float((first == again).double().mean()) < bounds.SAME_DRAWS:
        told = f"{int((first != again).sum())} of {prompts} tokens differ in a second call with the same seed"
        record.fail(f"temperature={HEAT}, seed=0: {told}", headroom=float("inf"), where={"seed": 0})
    if bool((by_seed == first).all()):
        told = f"the tokens of {prompts} prompts are the same with {SEEDS} seeds"
        record.fail(f"temperature={HEAT}: {told}: nothing is drawn", headroom=float("inf"))
        return
    t, mean, due = _distance(draws.log_p, by_seed[:-1])
    record.observations["draws"] = f"t = {t:.2f} of {SEEDS} seeds"
    limit = bounds.student_limit(SEEDS - 1)
    if not abs(t) <= limit:
        record.fail(
            f"temperature={HEAT}: drawn tokens are {'likelier' if t > 0 else 'less likely'} than draws from "
            f"softmax(logits / {HEAT}): the mean of log p is {mean:.3f}, should be {due:.3f} "
            f"({SEEDS} calls of {prompts} prompts, t = {t:.0f}, limit {limit:.1f})",
            headroom=abs(t) / limit, diagnosis=_instead(draws.log_p, by_seed[:-1]),
        )  # fmt: skip


def _distance(log_p: Tensor, tokens: Tensor) -> tuple[float, float, float]:
    """(Student's t, the mean log p of a token, what it should be) of tokens [calls, B] drawn from p [B, V]."""
    found = log_p.gather(1, tokens.T).sum(0)
    due, prompts = float((log_p.exp() * log_p).nan_to_num(0.0).sum()), len(log_p)
    error = float(found.std()) / len(tokens) ** 0.5
    off = float(found.mean()) - due
    return off / error if error else float("inf") * off, float(found.mean()) / prompts, due / prompts


# Of log p at the temperature asked for: the logits of another distribution.
INSTEAD: dict[str, Callable[[Tensor], Tensor]] = {
    "the temperature is ignored": lambda log_p: log_p * HEAT,
    "logits are divided by the temperature twice": lambda log_p: log_p / HEAT,
    "logits are multiplied by the temperature": lambda log_p: log_p * HEAT**2,
    "the distribution is cut to the 50 likeliest tokens (a default of transformers' generate)": lambda log_p: (
        log_p.masked_fill(log_p < log_p.topk(min(50, log_p.shape[1])).values[:, -1:], -torch.inf)
    ),
    "all tokens are drawn alike": torch.zeros_like,
}


def _instead(log_p: Tensor, tokens: Tensor) -> list[dict[str, str]]:
    """The other distributions that the draws may be of."""
    found = []
    for what, changed in INSTEAD.items():
        log_q = changed(log_p).log_softmax(-1)
        likely = log_q.gather(1, tokens.T).sum() > log_p.gather(1, tokens.T).sum()
        spread = _distance(log_q.clamp(min=-1e4), tokens)[0] if float(log_q.std()) else 0.0
        if bool(likely) and abs(spread) <= bounds.student_limit(SEEDS - 1):
            found.append({"fault": what, "evidence": f"draws of that are as likely as these (t = {spread:.1f})"})
    return found
