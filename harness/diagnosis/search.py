"""The search for a cause: suspects that explain the failing data, told apart and confirmed on other data."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

from torch import Tensor

from moe_harness.harness.core.call import Call
from moe_harness.harness.core.case import Case
from moe_harness.harness.core.catalogue import Fault, all_faults
from moe_harness.harness.core.invocation import Broken, Rejected, Trial
from moe_harness.harness.core.memory import poisoned_allocations
from moe_harness.harness.core.own_time import own_time
from moe_harness.harness.core.stage import Stage
from moe_harness.harness.diagnosis import plain, probed
from moe_harness.harness.diagnosis.candidates import (
    in_every_form,
    likely_first,
    restored,
    results,
    suspects,
    wobbled,
)
from moe_harness.harness.diagnosis.datasets import Dataset, probes, relatives, sequences
from moe_harness.harness.diagnosis.likelihood import Fit, Undiagnosable, likelihood_of
from moe_harness.harness.diagnosis.numerics_probes import sees_sums

SECONDS = 5.0
SMALL = 0.02  # error over value, rms: bf16 sums of a thousand terms, one by one, err by that
TOLD = 3  # causes told at most
CONFIRMATIONS = 2  # data sets on which a lone suspect has to be right before the search ends
UNEXPLAINED = 3  # failing data sets that nothing explains, before the search is given up
UNEXPLAINED_ROUNDINGS = 6  # where errors are as small as roundings: on the first ones they may be too small to tell
MISSES = 3  # data sets more on which every suspect misses than confirm it, before they are given up
NEAREST = 5  # suspects that are tried again with their own wavering counted


def explain(trial: Trial, case: Case, seconds: float = SECONDS) -> list[dict[str, str]]:
    """The faults that explain what the implementation does, best first; [] where none does.

    Args:
        trial: the implementation, in the process that has judged it.
        case: the failing case.
        seconds: when the time is over, only what has been confirmed until then is told.
    """
    own = trial.stage.part("causes")  # of a stage whose results are draws
    if own is not None:
        return own.explain(trial, case, seconds)
    try:
        always = plain.always_plain(trial, case)
        always = always or probed.summed_in_16_bits(trial, case)
        return always or _Search(trial, case, seconds).causes() or plain.plain_here(trial, case)
    except (Rejected, Broken, MemoryError, Undiagnosable):  # what broke the call is its own diagnosis
        return []


def known(stage: Stage) -> int:
    """How many mistakes of a stage have names: the faults of its catalogue, or what its own search tries."""
    own = stage.part("causes")
    return own.known() if own is not None else len(all_faults(stage.name))


@dataclass
class Candidate:
    """One suspect, how it fits the failing data, and how it fared on other data."""

    fault: Fault
    fit: Fit
    confirmed: list[str] = field(default_factory=list)  # data sets on which it shows and equals the result
    missed: list[str] = field(default_factory=list)  # data sets on which the result is another
    by_values: bool = False  # one of the confirmed results was more than all NaN, all zero or the like

    def rank(self) -> tuple[float, int, float]:
        return len(self.missed), -len(self.confirmed), self.fit.rms


@dataclass
class Observation:
    """A dataset with what the implementation returned there."""

    dataset: Dataset
    calls: list[Call]
    got: list[Any]
    truths: list[Any]
    right: bool

    @property
    def plain(self) -> bool:
        """Whether all that was got says nothing of the way it was computed."""
        firsts = (got[0] if isinstance(got, tuple) else got for got in self.got)
        return all(plain.kind(first, call.args)[0] is not None for first, call in zip(firsts, self.calls, strict=True))


class _Search:
    def __init__(self, trial: Trial, case: Case, seconds: float):
        self.trial, self.case, self.end = trial, case, own_time() + seconds
        self.all: list[Fault] = []
        self.subtle = False
        self.views: dict[Dataset, Observation | None] = {}  # made once for all searches

    def causes(self) -> list[dict[str, str]]:
        """From the catalogue; where it knows none, from what the implementation's own sums are probed to be."""
        subject = self.trial.subject
        found = likely_first(suspects(subject.stage, self.trial.device, subject.declared), self.case)
        known = in_every_form(found)
        self.subtle = self._errs_by_roundings()
        if not self.subtle:
            return self._search(known) or self._probed()
        roundings = [fault for fault in known if fault.family == "precision"]
        others = [fault for fault in known if fault.family != "precision"]
        # A store that probes have seen is surer than a likelihood: 0.50 sigma of one fault, 0.52 of what is right.
        told = probed.undeclared_store(self.trial, self.case) if sees_sums(subject.stage) else []
        return told or self._search(roundings) or self._probed() or self._search(others)

    def _errs_by_roundings(self) -> bool:
        """Whether the failing data are off by so little that a fault of precision is the likeliest."""
        dataset = next(self._datasets())
        view = self.views[dataset] = self._observe(dataset)
        if view is None or not isinstance(view.got[0], Tensor):
            return False
        want, got = view.truths[0].right, view.got[0].double()
        return float((got - want).square().sum()) < SMALL**2 * float(want.square().sum())

    def _probed(self) -> list[dict[str, str]]:
        if self._out_of_time() or not sees_sums(self.trial.subject.stage):
            return []
        told = probed.undeclared_store(self.trial, self.case)
        made = [] if told else probed.suspects(self.trial, self.case.dtype)
        return self._search(made) or self._by_size() if made else told

    def _search(self, among: list[Fault]) -> list[dict[str, str]]:
        if not among:  # a stage without faults of precision: every data set would be looked at for none
            return []
        self.all = among
        unexplained, most = 0, UNEXPLAINED_ROUNDINGS if self.subtle else UNEXPLAINED
        for dataset in self._datasets():
            if self._out_of_time() or unexplained == most:
                break
            view = self.views[dataset] = self.views[dataset] if dataset in self.views else self._observe(dataset)
            if view is None or view.right or self._is_subtle(view):
                continue
            found, others = self._explaining(view)
            unexplained += 1
            self._tell_apart(found, dataset)
            # What some call contradicts is no cause, however many others it explains.
            # Of a plain output many faults are confirmed, until a call of another shape contradicts them.
            whole, sound = not self._out_of_time(), [s for s in found if s.confirmed and not s.missed]
            told = sorted((s for s in sound if s.by_values or whole), key=Candidate.rank)
            if told:
                return _tell(told, found, others)
        return []

    def _by_size(self) -> list[dict[str, str]]:
        """Sums in too few bits, in an order that was not tried: their errors are of one size whatever the order."""
        seen: dict[str, list[tuple[float, float]]] = {fault.name: [] for fault in self.all}
        for dataset in [next(self._datasets()), *relatives(self.case)]:
            view = None if self._out_of_time() or dataset.cases[0].data == "exact" else self._observe(dataset)
            if view is None or view.right:
                continue
            right = [truth.right for truth in view.truths]
            got = self._fit(view, right)
            for fault in self.all if not got.mismatched else ():
                found = results(self.trial.stage, fault, view.calls)
                size = 0.0 if found is None else self._fit(replace(view, got=found), right).rms
                seen[fault.name] += [(size, got.rms)] if size and got.rms else []
        return probed.of_same_size(self.all, seen)

    def _datasets(self) -> Iterator[Dataset]:
        yield Dataset((self.case.once(),))
        yield from sequences(self.case, 1)
        yield from relatives(self.case)
        yield from probes(self.case)

    def _out_of_time(self) -> bool:
        return own_time() > self.end

    # ---------------------------------------------------------------------------------------------- one data set

    def _observe(self, dataset: Dataset) -> Observation | None:
        """What the implementation does there; None where it refuses or breaks."""
        calls = self._calls(dataset)
        return self._observed(dataset, calls, self._truths(calls))

    def _observed(self, dataset: Dataset, calls: list[Call], truths: list[Any]) -> Observation | None:
        got = self._got(calls)
        if got is None:
            return None
        right = not any(self.trial.judge(call, result).findings for call, result in zip(calls, got, strict=True))
        for truth, result in zip(truths, got, strict=True):
            if hasattr(truth, "focus"):
                truth.focus(result)
        return Observation(dataset, calls, got, truths, right)

    def _got(self, calls: Sequence[Call]) -> list[Any] | None:
        found = []
        for call in calls:
            try:
                with poisoned_allocations(self.trial.device), restored(self.trial.stage, call):
                    result = self.trial.invoke(call)
            except (Rejected, Broken):
                return None
            found.append(tuple(r.clone() for r in result) if isinstance(result, tuple) else result.clone())
        return found

    def _calls(self, dataset: Dataset) -> list[Call]:
        return [self.trial.build(case) for case in dataset.cases]

    def _truths(self, calls: Sequence[Call]) -> list[Any]:
        for call in calls:
            self.trial.expect(call)  # the bound of the likelihood is the judge's too, where nothing is declared
        return [likelihood_of(self.trial.stage, call) for call in calls]

    def _fit(self, view: Observation, candidate: Sequence[Any], wavering: Sequence[tuple] | None = None) -> Fit:
        wavering = wavering or [()] * len(view.calls)
        parts = zip(view.truths, candidate, view.got, wavering, strict=True)
        return reduce(Fit.plus, (truth.fit(one, two, others) for truth, one, two, others in parts))

    def _is_subtle(self, view: Observation) -> bool:
        """Whether an exact case misses by less than rounding gives on other data: no distance can be told there."""
        if view.calls[0].case.data != "exact":
            return False
        return self._fit(view, [truth.right for truth in view.truths]).equal()

    def _explaining(self, view: Observation) -> tuple[list[Candidate], list[Candidate]]:
        """(suspects that explain the result, the others), each nearest first."""
        tried: list[Candidate] = []
        alone, half = len(view.calls) == 1, (self.end + own_time()) / 2
        for fault in self.all:
            if own_time() > half and (self._out_of_time() or any(s.fit.explains(len(self.all)) for s in tried)):
                break  # the other half of the time is for telling apart what was found
            if alone and fault.stateful:  # what the implementation remembers here is not known
                continue
            found = results(self.trial.stage, fault, view.calls)
            if found is not None:
                tried.append(Candidate(fault, self._fit(view, found)))
        tried.sort(key=lambda s: (s.fit.mismatched, s.fit.rms))
        hits = [s for s in tried if s.fit.explains(len(self.all))]
        if not hits:
            self._let_waver(view, tried)
            hits = [s for s in tried if s.fit.explains(len(self.all))]
        return hits, [s for s in tried if s not in hits]

    def _let_waver(self, view: Observation, tried: list[Candidate]) -> None:
        """Try the nearest again: a fault that rounds coarsely jumps where a rounding before it differs a little."""
        nearer = [s for s in tried if s.fit.mismatched or s.fit.gain() > 0]
        for candidate in nearer[:NEAREST]:
            if self._out_of_time():
                return
            found = results(self.trial.stage, candidate.fault, view.calls)
            if found is None or candidate.fault.stateful:
                continue
            others = [wobbled(self.trial.stage, candidate.fault, call) for call in view.calls]
            candidate.fit = self._fit(view, found, others)

    # ---------------------------------------------------------------------------------------------- other data sets

    def _tell_apart(self, found: list[Candidate], failing: Dataset) -> None:
        """Run other data sets until one suspect is left that two of them confirm, or all are run."""
        remembering = any(s.fault.stateful for s in found)
        others = list(sequences(self.case))
        if len(failing.cases) == 1:  # a sequence too: what holds in every later call need not hold in the first
            near = list(relatives(failing.cases[0]))
            others = [near[0], others[0], *near[1:]]
        for dataset in [*others, *([] if remembering else probes(self.case))]:
            alive = [s for s in found if not s.missed] or found
            if all(len(s.missed) >= len(s.confirmed) + MISSES for s in found):
                return
            if self._out_of_time() or (len(alive) == 1 and len(alive[0].confirmed) >= CONFIRMATIONS):
                return
            if dataset != failing:
                self._try(alive, dataset)

    def _try(self, alive: list[Candidate], dataset: Dataset) -> None:
        """One more data set, where the suspects differ from each other or one of them still has to be confirmed."""
        try:
            calls = self._calls(dataset)
        except (RuntimeError, ValueError, IndexError):  # a shape for which this kind of data does not exist
            return
        outputs = [results(self.trial.stage, s.fault, calls) for s in alive]
        truths = self._truths(calls)
        shows = [out is not None and not self._same(truths, out, [t.right for t in truths]) for out in outputs]
        # One that rounds may show in the judge's statistics although no element tells it from what is right.
        if not any(shows) and all(s.fault.family != "precision" for s in alive):
            return
        differ = any(out is None or not self._same(truths, outputs[0], out) for out in outputs) if outputs[0] else True
        if not differ and all(len(s.confirmed) >= CONFIRMATIONS for s in alive):
            return
        untouched = all(out is not None for out in outputs)  # one that broke may have written into its operands
        view = self._observed(dataset, calls, truths) if untouched else self._observe(dataset)
        if view is None:
            return
        for candidate, out, seen in zip(alive, outputs, shows, strict=True):
            self._count(candidate, view, out, seen)

    def _count(self, candidate: Candidate, view: Observation, out: Any, shows: bool) -> None:
        name = view.dataset.name
        if out is None:
            return
        fit = self._fit(view, out)
        if not fit.equal() and (fit.mismatched or fit.gain() > 0) and not candidate.fault.stateful:
            fit = self._fit(view, out, [wobbled(self.trial.stage, candidate.fault, call) for call in view.calls])
        explains = fit.explains(len(self.all)) and (shows or not view.right)
        if not fit.equal() or not (shows or view.right or explains):
            candidate.missed.append(name)
        elif explains:
            candidate.confirmed.append(name)
            candidate.by_values |= not view.plain

    def _same(self, truths: Sequence[Any], one: Sequence[Any], two: Sequence[Any]) -> bool:
        return all(t.fit(a, b).equal() for t, a, b in zip(truths, one, two, strict=True))


def _tell(told: list[Candidate], found: list[Candidate], others: list[Candidate]) -> list[dict[str, str]]:
    best = told[0]
    tied = [s for s in told if s.rank()[:2] == best.rank()[:2] and s is not best]
    lines: list[dict[str, str]] = []
    for candidate in told:
        if len(lines) < TOLD and candidate.fault.name not in (line["fault"] for line in lines):
            lines.append({"fault": candidate.fault.name, "evidence": _evidence(candidate, found, others, tied)})
    return lines


def _evidence(candidate: Candidate, found: list[Candidate], others: list[Candidate], tied: list[Candidate]) -> str:
    fit = candidate.fit
    near = f"to {fit.rms:.2g} sigma (largest {fit.largest:.2g} of {fit.elements} elements)"
    form = f" Here {candidate.fault.form}." if candidate.fault.form else ""
    away = f"The result equals this {near}, the right answer is {_away(fit.right_rms)} away"
    text = [f"{candidate.fault.consequence}{form} {away}"]
    text.append(_next(candidate, found, others, tied))
    count = len(candidate.confirmed)
    text.append(f"confirmed on {count} other data set{'s' if count > 1 else ''}, as {candidate.confirmed[0]}")
    return "; ".join(part for part in text if part)


def _next(candidate: Candidate, found: list[Candidate], others: list[Candidate], tied: list[Candidate]) -> str:
    if candidate in tied or (tied and candidate not in tied):
        names = [s.fault.label for s in tied if s is not candidate]
        if names:
            return f"{', '.join(names[:3])} cannot be told from it on any data tried"
    ruled_out = [s for s in found if s is not candidate and s.missed]
    if ruled_out:
        return f"{ruled_out[0].fault.label} explains this too, but not {ruled_out[0].missed[0]}"
    if others:
        near = others[0]
        distance = (
            "of another kind (NaN or infinite elsewhere)" if near.fit.mismatched else f"{_away(near.fit.rms)} away"
        )
        return f"the next candidate, {near.fault.label}, is {distance}"
    return ""


def _away(sigmas: float) -> str:
    return "infinitely many sigma" if sigmas == float("inf") else f"{sigmas:.3g} sigma"
