"""`moe-harness explain NAME`: what a check asks, what a fault does, what a stage's contract is."""

import inspect
import textwrap
import tomllib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from moe_harness.harness.commands import options
from moe_harness.harness.core import contracts, registry
from moe_harness.harness.core.errors import unknown
from moe_harness.harness.core.ranked_stage import plan_over_ranks
from moe_harness.harness.core.registry import needed_part

SOURCE_LINES = 12  # of a fault's code

Lines = Iterator[tuple[str, str]]  # (label, text)


def _names() -> Iterator[str]:
    """All that can be explained, for completion."""
    told = _explanations()
    yield from [*options.ALL_STAGES, *told["roundings"], *told["checks"], *options.fault_names()]


def _explanations() -> dict[str, dict[str, dict[str, str]]]:
    return tomllib.loads(Path(__file__).with_name("explanations.toml").read_text(encoding="utf-8"))


def explain(
    name: Annotated[
        str,
        typer.Argument(
            help="A check, a fault or cause, a rounding, or a stage.", autocompletion=options.starting_with(_names)
        ),
    ],
) -> None:
    """Explain a check, a fault of the catalogue, a rounding or a stage: equation, bound, source, example."""
    from rich.console import Console
    from rich.text import Text

    from moe_harness.harness.report.terminal import labelled

    explanations = _explanations()
    described: dict[str, Callable[[], Lines]] = {
        **{stage: partial(_stage, stage) for stage in options.ALL_STAGES},
        **{name: partial(_rounding, name, told) for name, told in explanations["roundings"].items()},
        **{name: partial(_check, name, told) for name, told in explanations["checks"].items()},
    }
    if name not in described:
        described |= {check: partial(_unwritten, check) for stage in options.ALL_STAGES for check in _checks(stage)
                      if check not in described}  # fmt: skip
    if name not in described:
        described |= {fault.name: partial(_fault, fault) for fault in _faults()}
    if name not in described:
        raise unknown("check, fault, rounding or stage", name, list(described))
    console = Console()
    console.print(Text(name, style="bold"))
    console.print(labelled(list(described[name]())))


def _check(name: str, told: dict[str, str]) -> Lines:
    yield "asks", told["question"]
    yield from ((label, told[label]) for label in ("equation", "bound", "source"))
    for stage in options.ALL_STAGES:
        if (example := _example(stage, name)) is not None:
            known = list(registry.registered(stage))
            yield (
                "example",
                f"moe-harness replay {example} --impl {'torch:loop' if 'torch:loop' in known else known[0]}",
            )
            return


def _checks(stage: str) -> list[str]:
    """On one device and over ranks."""
    ranked = options.known_checks(stage, _request(), over_ranks=True) if stage in contracts.OVER_RANKS else []
    return list(dict.fromkeys([*options.known_checks(stage, _request()), *ranked]))


def _unwritten(name: str) -> Lines:
    """A check that a stage brings along and that has no words here."""
    stages = [stage for stage in options.ALL_STAGES if name in _checks(stage)]
    yield "asks", f"a check of {', '.join(stages)}"
    yield "example", next((e for stage in stages if (e := _example(stage, name)) is not None), "none on one device")


def _example(stage: str, check: str) -> str | None:
    from moe_harness.harness.core.plan import Request, plan

    cases = list(plan_over_ranks(stage, [2])) if stage in contracts.OVER_RANKS else []
    if stage in contracts.STAGES:
        cases += plan(stage, Request())
    return next((planned.id for planned in cases if planned.check == check), None)


def _rounding(name: str, told: dict[str, str]) -> Lines:
    if "question" in told:
        yield "stored", told["question"]
    yield from ((f"in {stage}", words) for stage, words in told.items() if stage != "question")
    yield "bound", "its variance, ulp^2 / 12 of each value stored, is part of sigma where it is permitted"
    yield "declared", f"kernel.rounds = ({name!r}, ...); {_accepted(name)}"


def _accepted(name: str) -> str:
    """Whether a rounding has to be declared, and of which stage."""
    stages = [s for s in contracts.STAGES if name in getattr(needed_part(s, "contract"), "DECLARED_ONLY", ())]
    if stages:
        return f"accepted only where it is declared, in {', '.join(stages)}"
    anyway = name not in contracts.DECLARED_ROUNDINGS[len(contracts.ROUNDINGS) :]
    return "permitted with none declared" if anyway else "accepted only where it is declared"


def _stage(name: str) -> Lines:
    from moe_harness.harness.commands.init import stages
    from moe_harness.harness.commands.list import signature

    yield "contract", signature(name)
    yield "checks", ", ".join(_checks(name))
    yield "registered", ", ".join(registry.registered(name)) or "nothing"
    if name in stages():
        yield "to begin", f"moe-harness init {name}"


def _request() -> Any:
    from moe_harness.harness.core.plan import Request

    return Request()


def _faults() -> Iterable[Any]:
    from moe_harness.harness.core.catalogue import all_faults

    return all_faults()


def _fault(fault: Any) -> Lines:
    yield "is", f"a known fault of {fault.stage} ({fault.family})"
    yield "consequence", fault.consequence
    yield "shows", fault.condition
    if fault.hidden:
        yield "hidden", "where " + ", or ".join(fault.hidden)
    yield "source", fault.source or "none published; a mistake of its kind"
    code = textwrap.dedent(inspect.getsource(inspect.unwrap(fault.function))).strip().splitlines()
    code = code[next((at for at, line in enumerate(code) if line.startswith(("def ", "class "))), 0) :]
    yield "code", "\n".join(code[:SOURCE_LINES] + (["..."] if len(code) > SOURCE_LINES else []))
    yield "example", f"moe-harness faults --fault {fault.name}"
