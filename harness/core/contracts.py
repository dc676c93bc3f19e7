"""The stages, the signatures that their implementations have, and what an implementation says of itself; no torch."""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from moe_harness.harness.core import registry
from moe_harness.harness.core.blame import hand_over
from moe_harness.harness.core.errors import UsageError, unknown
from moe_harness.harness.core.registry import needed_part, stage_part, stages_with

DTYPES = ("fp32", "fp16", "bf16")
DEVICES = ("cpu", "cuda")
ROUNDINGS = ("gate_up", "activation", "expert_output", "weighted", "partial_sum", "routing_weight")
# Beyond the contract's six: products of fp32 operands rounded to tf32 first, which has to be declared to be accepted.
DECLARED_ROUNDINGS = (*ROUNDINGS, "tf32")
REJECTIONS = (NotImplementedError, ValueError, TypeError)

DTYPE_ALIASES = {"float32": "fp32", "float": "fp32", "float16": "fp16", "half": "fp16", "bfloat16": "bf16"}


STAGES = stages_with("contract")
SIGNATURES: dict[str, inspect.Signature] = {
    stage: inspect.signature(getattr(needed_part(stage, "contract"), stage)) for stage in STAGES
}
OVER_RANKS = stages_with("ranked")  # one object or one call per rank; see core.ranked_stage
RANK_STAGES = tuple(stage for stage in OVER_RANKS if stage not in STAGES)  # those that are judged in no other way


def permissive(stage: str) -> tuple[str, ...]:
    """What results of a stage may be rounded by where its implementation declares nothing."""
    return getattr(stage_part(stage, "contract"), "ROUNDINGS", ROUNDINGS)


def roundings(stage: str) -> tuple[str, ...]:
    """What an implementation of a stage may declare."""
    own = getattr(stage_part(stage, "contract"), "DECLARED_ONLY", ())
    return (*permissive(stage), *DECLARED_ROUNDINGS[len(ROUNDINGS) :], *own)


@dataclass(frozen=True)
class Declarations:
    """What an implementation says about itself, as attributes of the function; all optional."""

    dtypes: tuple[str, ...] = DTYPES
    devices: tuple[str, ...] = DEVICES
    rounds: tuple[str, ...] | None = None
    deterministic: bool = False
    batch_invariant: bool = False
    graph_capturable: bool = False
    explicit: tuple[str, ...] = field(default=())
    extra: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)  # those that only this stage knows

    @classmethod
    def of(cls, function: Callable, stage: str | None = None) -> "Declarations":
        """Read the attributes of `function`; a value outside the contract is a UsageError that names it.

        A stage's `contract.py` may name its own permissive set (`ROUNDINGS`), roundings that have to be declared to be
        accepted (`DECLARED_ONLY`), and attributes that only it knows (`DECLARATIONS`, the values that each may hold).
        """
        contract = stage_part(stage, "contract") if stage else None
        rounds = roundings(stage) if stage else DECLARED_ROUNDINGS
        own = [name for name in cls.__dataclass_fields__ if name not in ("explicit", "extra")]
        found = {name: getattr(function, name) for name in own if getattr(function, name, None) is not None}
        for name, known in (("dtypes", DTYPES), ("devices", DEVICES), ("rounds", rounds)):
            if name in found:
                found[name] = _names(name, found[name], known)
        for name in ("deterministic", "batch_invariant", "graph_capturable"):
            if name in found and not isinstance(found[name], bool):
                raise UsageError(f"the attribute {name!r} is {found[name]!r}, but should be True or False")
        extra = {
            name: _names(name, getattr(function, name), known)
            for name, known in getattr(contract, "DECLARATIONS", {}).items()
            if getattr(function, name, None) is not None
        }
        return cls(**found, explicit=tuple(sorted({*found, *extra})), extra=extra)

    def as_dict(self) -> dict[str, Any]:
        told = asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in (told | told.pop("extra")).items()}


def _names(attribute: str, value: Any, known: tuple[str, ...]) -> tuple[str, ...]:
    values = [value] if isinstance(value, str) or not hasattr(value, "__iter__") else list(value)
    names = tuple(DTYPE_ALIASES.get(name, name) for name in (str(v).removeprefix("torch.") for v in values))
    for name in names:
        if name not in known:
            raise UsageError(f"the attribute {attribute!r} holds {name!r}, but should hold only {', '.join(known)}")
    if not names and attribute != "rounds":
        raise UsageError(f"the attribute {attribute!r} is empty, but should hold some of {', '.join(known)}")
    return names


@dataclass(frozen=True)
class Subject:
    """An implementation under judgement."""

    stage: str
    spec: str
    function: Callable
    declared: Declarations
    parameters: frozenset[str] | None  # None where the signature cannot be read or takes **kwargs

    def missing_keywords(self, keywords: dict[str, Any]) -> list[str]:
        """Keyword arguments this implementation has no parameter for and whose value is not the default."""
        return [k for k in keywords if self._lacks(k) and not self._is_default(k, keywords[k])]

    def call(self, args: dict[str, Any], keywords: dict[str, Any]) -> Any:
        """Call it as the contract says; a keyword it lacks is left out where the value is the contract's default."""
        passed = {k: v for k, v in keywords.items() if not self._lacks(k)}
        return hand_over(self.function, *args.values(), **passed)

    def _lacks(self, keyword: str) -> bool:
        return self.parameters is not None and keyword not in self.parameters

    def _is_default(self, keyword: str, value: Any) -> bool:
        default = SIGNATURES[self.stage].parameters[keyword].default
        return value is default or (isinstance(value, str | int | float) and value == default)


def check_stage(stage: str, stages: tuple[str, ...] = STAGES) -> str:
    if stage not in stages:
        raise unknown("stage", stage, list(stages))
    return stage


def load(stage: str, spec: str) -> Subject:
    """Find the implementation that `spec` names.

    Raises:
        UsageError: no such name, file or attribute; not callable; a signature that cannot take the contract's call.
        CannotJudge: the module or file exists but fails while it is imported.
    """
    check_stage(stage)
    function = registry.find(stage, spec)
    if not callable(function) or isinstance(function, type):
        kind = "a class" if isinstance(function, type) else type(function).__name__
        raise UsageError(
            f"{spec!r} is {kind}, but should be a function (or an object that can be called) with the signature\n"
            f"  {stage}{SIGNATURES[stage]}"
        )
    return Subject(stage, spec, function, Declarations.of(function, stage), _check_signature(stage, spec, function))


def _check_signature(stage: str, spec: str, function: Callable) -> frozenset[str] | None:
    """The parameter names, or None where anything goes; raises UsageError where the contract's call cannot bind."""
    contract = SIGNATURES[stage]
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # builtins and some C++ operators have none
        return None
    parameters = signature.parameters.values()
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    positional = [p for p in contract.parameters.values() if p.kind is not p.KEYWORD_ONLY]
    keywords = [p for p in contract.parameters.values() if p.kind is p.KEYWORD_ONLY]
    passed = {p.name: None for p in keywords if takes_any or p.name in signature.parameters}
    required = [p.name for p in keywords if p.default is p.empty and p.name not in passed]
    try:
        if required:
            raise TypeError(f"missing the argument {required[0]!r}")
        signature.bind(*[None] * len(positional), **passed)
    except TypeError as error:
        raise UsageError(
            f"implementation {spec!r} has another signature ({error})\n"
            f"  got:    {getattr(function, '__name__', spec)}{signature}\n  wanted: {stage}{contract}"
        ) from None
    moved = swapped([p.name for p in positional], signature)
    if moved is not None:
        name, wanted, own = moved
        raise UsageError(
            f"implementation {spec!r} takes its arguments in another order: {name} is the {ordinal(own)}, but the "
            f"contract hands it over as the {ordinal(wanted)}\n"
            f"  got:    {getattr(function, '__name__', spec)}{signature}\n  wanted: {stage}{contract}"
        )
    return None if takes_any else frozenset(signature.parameters)


# What people call them; only where the names of both places say so.
IDS = re.compile(r"(^|_)(ids?|idx|indexes|indices|selected)(_|$)", re.IGNORECASE)
WEIGHTS = re.compile(r"(^|_)(weights?|probs?|probabilit\w*|scores?)(_|$)", re.IGNORECASE)
PAIR = ("topk_weights", "topk_ids")


def swapped(wanted: Sequence[str], signature: inspect.Signature) -> tuple[str, int, int] | None:
    """(a parameter, the place where the contract's call hands that argument over, its own place), from 1; or None.

    A parameter with the contract's own name in another place is one, and so are `expert_ids, expert_weights` for
    `topk_weights, topk_ids`.
    """
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [name for name, parameter in signature.parameters.items() if parameter.kind in kinds][: len(wanted)]
    for place, name in enumerate(names):
        if name in wanted and wanted.index(name) != place:
            return name, wanted.index(name) + 1, place + 1
    if all(name in wanted for name in PAIR) and len(names) == len(wanted):
        weights, ids = (wanted.index(name) for name in PAIR)
        if IDS.search(names[weights]) and WEIGHTS.search(names[ids]) and not WEIGHTS.search(names[weights]):
            return names[ids], weights + 1, ids + 1
    return None


def ordinal(number: int) -> str:
    """1st, 2nd, 3rd, 4th: there are never more than ten arguments."""
    return f"{number}{ {1: 'st', 2: 'nd', 3: 'rd'}.get(number, 'th') }"
