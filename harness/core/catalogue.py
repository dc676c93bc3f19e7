"""The catalogue: what a fault is, how one is added, and how they are found.

A fault is a plain function with the signature of its stage, in a module of the stage's folder `faults/`, so it is
judged like any implementation.  Adding one is

    @fault("layout", source="owner/repo/pull/1", condition="T > 16", shows={"T": 17}, hidden=("T=16",))
    def gate_up_swapped(*call: Tensor, **options: Any) -> Tensor:
        '''What a user would see.'''
        return run(*call, **options, split=lambda rows: rows.chunk(2, -1)[::-1])

Its docstring is the consequence.  `condition` says in words when it shows, `shows` holds the fields of one small case
of the stage on which it does, and `sign` what is seen there; each `hidden` entry of the form "k=v,k=v" changes that
case into one where the fault gives the right answer.  A fault that remembers shows behind another call alone: `before`
holds the fields in which the case of that call is another.  What it is built from are the right steps of the stage
(`faults/_steps.py`); called with `steps=`, it is built from others.

A mistake that is the same with another number (tiles of 64 or of 128, a table of 2,048 positions or of 4,096) is one
fault: `variants={"size": (16, 64, 128)}` names what its function takes beside the arguments of the stage, the first of
each being what it does by itself.  It is judged as it is, and recognised in every form.
"""

import difflib
import functools
import importlib
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from moe_harness.harness.core.case import Case, case_types, changed
from moe_harness.harness.core.contracts import RANK_STAGES, SIGNATURES, STAGES
from moe_harness.harness.core.registry import PACKAGE, modules_of

RANKED = RANK_STAGES  # judged over many ranks; see harness.core.ranked_faults
STAGES_WITH_FAULTS = (*STAGES, *RANKED)

SIGNS = {
    "value": "the result differs from the reference by more than rounding",
    "raises": "an exception that is not a rejection",
    "dtype": "the result has another dtype",
    "shape": "the result is not a tensor of the right shape",
    "inputs": "an argument was modified",
    "guards": "memory outside the arguments was written",
    "earlier": "a later call changed an earlier result, or the result shares memory with an input",
    "repeat": "two equal calls differ in bits although `deterministic` is declared",
    "batch": "a row depends on the rest of the batch although `batch_invariant` is declared",
    "process": "the process dies, hangs or grows",
}


@dataclass(frozen=True)
class Fault:
    """One wrong behaviour of one stage."""

    name: str
    stage: str
    family: str
    condition: str  # when it shows, in words
    consequence: str  # one sentence
    function: Callable[..., Any] = field(repr=False)
    source: str | None = None  # URL of the published bug
    hidden: tuple[str, ...] = ()  # where it equals the right answer; "k=v,k=v" is data, anything without "=" prose
    shows: Mapping[str, Any] | None = None  # fields of a small case; None where none is feasible on a CPU
    sign: str = "value"  # a key of SIGNS: what is seen in that case
    devices: tuple[str, ...] = ("cpu", "cuda")
    few: str | None = None  # why fewer than three cases of a quick run kill it
    stateful: bool = False  # keeps something between calls, so a verdict depends on the calls before
    before: Mapping[str, Any] | None = None  # fields in which the case of a call before differs; without it none shows
    part: "Fault | None" = field(default=None, repr=False)  # inside a block: the fault of its part
    variants: Mapping[str, tuple[Any, ...]] = field(default_factory=dict, repr=False)
    form: str = ""  # of one of the variants, "size=64"

    @property
    def spec(self) -> str:
        """The name under which it is judged, as for any implementation."""
        return f"{self.function.__module__}:{self.name}"

    @property
    def home(self) -> str:
        """The module whose code is wrong, and which holds what a stateful fault keeps."""
        return (self.part or self).function.__module__

    @property
    def label(self) -> str:
        """The name, with the form where it is not the one that the catalogue judges."""
        return f"{self.name} ({self.form})" if self.form else self.name

    def example(self) -> Case:
        """The small case on which it shows; ValueError where none is feasible on a CPU."""
        if self.shows is None:
            raise ValueError(f"the fault {self.name} has no case on which it shows on a CPU")
        return case_types()[self.stage](**self.shows)

    def hiding(self) -> "Iterator[tuple[str, Case]]":
        """The entries of `hidden` that are data, each with the case where it gives the right answer."""
        for entry in self.hidden:
            if "=" in entry:
                yield entry, changed(self.example(), entry)

    def other_forms(self) -> "Iterator[Fault]":
        """The same mistake with other numbers: every combination of `variants` but the first."""
        for values in itertools.islice(itertools.product(*self.variants.values()), 1, None):
            own = dict(zip(self.variants, values, strict=True))
            form = ", ".join(f"{name}={value}" for name, value in own.items())
            yield replace(self, function=_with(self.function, own), form=form, variants={})


def _with(function: Callable[..., Any], own: Mapping[str, Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **keywords: Any) -> Any:
        return function(*args, **own, **keywords)

    return call


_FAULTS: dict[str, Fault] = {}


def fault(
    family: str,
    *,
    source: str | None = None,
    condition: str = "always",
    shows: Mapping[str, Any] | None = MappingProxyType({}),
    before: Mapping[str, Any] | None = None,
    hidden: tuple[str, ...] = (),
    sign: str = "value",
    devices: tuple[str, ...] = ("cpu", "cuda"),
    stateful: bool = False,
    few: str | None = None,
    variants: Mapping[str, tuple[Any, ...]] = MappingProxyType({}),
    **declares: object,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enter a function in the catalogue; `declares` become attributes of it (`deterministic=True`, ...).

    Args:
        source: where the bug was published, a URL or a path of GitHub.
        variants: what the function takes beside the arguments of the stage, and the values to recognise.

    Raises:
        ValueError: unknown `sign`, a name that is taken, or no docstring.
    """
    if sign not in SIGNS:
        raise ValueError(f"sign is {sign!r}, but should be one of {', '.join(SIGNS)}")

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        stage = stage_of(function)
        signature = SIGNATURES[stage]

        @functools.wraps(function)
        def call(*args: Any, steps: Any = None, **keywords: Any) -> Any:
            # Tensors reach the fault by position however they were given, so that it may take them as `*call`.
            others = {name: keywords.pop(name) for name in variants if name in keywords}
            bound = signature.bind(*args, **keywords)
            others |= {} if steps is None else {"steps": steps}
            return function(*bound.args, **bound.kwargs, **others)

        call.__signature__ = signature  # type: ignore[attr-defined]
        for attribute, value in {"devices": devices, **declares}.items():
            setattr(call, attribute, value)
        example = None if shows is None else MappingProxyType(dict(shows))
        enter(Fault(
            function.__name__, stage, family, condition, consequence_of(function), call, url(source), hidden, example,
            sign, devices, few, stateful, before, None, dict(variants),
        ))  # fmt: skip
        return call

    return decorate


def stage_of(function: Callable[..., Any]) -> str:
    """The stage in whose folder a fault is written."""
    return function.__module__.removeprefix(f"{PACKAGE}.").split(".")[0]


def consequence_of(function: Callable[..., Any]) -> str:
    """The first paragraph of a fault's docstring on one line; ValueError where there is none."""
    text = inspect.getdoc(function) if function.__doc__ else None
    if not text:
        raise ValueError(f"the fault {function.__name__} should have a docstring that says what a user would see")
    return " ".join(text.split("\n\n")[0].split())


def url(source: str | None) -> str | None:
    """A full URL of what may be a path of GitHub."""
    return source if source is None or "://" in source else f"https://github.com/{source}"


def enter(found: Fault) -> None:
    """Add to the catalogue; ValueError where another module has a fault of that name.

    A module may be executed again (reload, run by path).
    """
    known = _FAULTS.get(found.name)
    if known is not None and known.function.__module__ != found.function.__module__:
        raise ValueError(f"a fault named {found.name!r} exists already, in {known.function.__module__}")
    _FAULTS[found.name] = found


def known() -> tuple[Fault, ...]:
    """The faults of the modules that are imported by now."""
    return tuple(_FAULTS.values())


def modules() -> tuple[str, ...]:
    """The modules that hold faults: `stages/<stage>/faults/*.py`, those of a stage in the order of their names."""
    return tuple(module for stage in STAGES_WITH_FAULTS for module in modules_of(stage, "faults"))


def all_faults(stage: str | None = None) -> tuple[Fault, ...]:
    """Every fault, or those of one stage, in the order of the modules and as they stand in each."""
    place = {module: at for at, module in enumerate(modules())}
    for module in place:
        importlib.import_module(module)
    chosen = [found for found in known() if stage in (None, found.stage)]
    return tuple(sorted(chosen, key=lambda found: place.get(found.function.__module__, len(place))))


def get(name: str) -> Fault:
    """The fault of that name.

    Raises:
        KeyError: there is none; the message tells the nearest names.
    """
    all_faults()
    if name in _FAULTS:
        return _FAULTS[name]
    near = difflib.get_close_matches(name, _FAULTS, n=3)
    raise KeyError(f"no fault is named {name!r}" + (f"; nearest: {', '.join(near)}" if near else ""))
