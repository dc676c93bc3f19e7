"""What the commands share: options, their completion in a shell, and how a value becomes what was meant.

Every list may be given in one option with commas or in several options; names of dtypes and of models are taken in any
usual spelling.
"""

import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from moe_harness.harness.core import contracts, registry
from moe_harness.harness.core.errors import CannotJudge, HarnessError, UsageError, unknown
from moe_harness.harness.core.names import CHECK_NAMES
from moe_harness.harness.core.plan import PROFILES, Request

ALL_STAGES = (*contracts.STAGES, *contracts.RANK_STAGES)
WORLDS = (1, 2, 3, 4)  # where --ranks says nothing else


def starting_with(names: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """Completion of a value from `names`, of the last one in a list with commas too."""

    def complete(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        return [before + comma + name for name in names() if name.startswith(last)]

    return complete


def fault_names() -> list[str]:
    """Of the whole catalogue, whose modules import torch."""
    from moe_harness.harness.core.catalogue import all_faults

    return [fault.name for fault in all_faults()]


def implementations() -> list[str]:
    return sorted({name for stage in ALL_STAGES for name in registry.registered(stage)})


def _check_names() -> Iterable[str]:
    """On one device and over ranks."""
    from moe_harness.harness.core.ranked_stage import find_ranked

    ranked = (check for stage in contracts.OVER_RANKS for check in find_ranked(stage).checks)
    return dict.fromkeys([*CHECK_NAMES, *ranked])


def _configs() -> list[str]:
    from moe_harness.fixtures.configs import names

    return names()


Stage = Annotated[
    str,
    typer.Option(
        "--stage", "-s", help=f"What it is: {', '.join(ALL_STAGES)}.", autocompletion=starting_with(lambda: ALL_STAGES)
    ),
]
Impl = Annotated[
    list[str],
    typer.Option(
        "--impl", "-i", help="A registered name, module:function or file.py:function; several are shown side by side.",
        autocompletion=starting_with(implementations),
    ),
]  # fmt: skip
Device = Annotated[
    str, typer.Option("--device", help="cpu or cuda.", autocompletion=starting_with(lambda: contracts.DEVICES))
]
Dtypes = Annotated[
    list[str] | None,
    typer.Option(
        "--dtype", help="fp32, fp16, bf16, or PyTorch's names; otherwise those it declares.",
        autocompletion=starting_with(lambda: contracts.DTYPES),
    ),
]  # fmt: skip
Profile = Annotated[
    str,
    typer.Option("--profile", help=f"{', '.join(PROFILES)}.", autocompletion=starting_with(lambda: PROFILES)),
]
Configs = Annotated[
    list[str] | None,
    typer.Option(
        "--config", help="Add the shapes of a released model, in any case.", autocompletion=starting_with(_configs)
    ),
]
Checks = Annotated[
    list[str] | None,
    typer.Option("--check", help="Only these checks.", autocompletion=starting_with(_check_names)),
]
Baseline = Annotated[
    Path | None,
    typer.Option("--baseline", help="Compare with this recorded run (moe-harness record); a regression ends with 1."),
]
Seed = Annotated[int, typer.Option("--seed", help="Other data, other combinations.", min=0)]
Timeout = Annotated[float, typer.Option("--timeout", help="Seconds one case may take.", min=1)]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback behind a message.")]


def listed(values: Iterable[str] | None) -> tuple[str, ...]:
    """The names in options that may be repeated and may hold commas, each once."""
    parts = (part.strip() for value in values or () for part in value.split(","))
    return tuple(dict.fromkeys(part for part in parts if part))


def specs(values: Iterable[str]) -> tuple[str, ...]:
    """The implementations of --impl; a path that holds a comma is one of them all the same."""
    found: list[str] = []
    for value in values:
        found += [value] if Path(value.rpartition(":")[0]).exists() else listed([value])
    if not found:
        raise UsageError("--impl names nothing; `moe-harness list` prints what is registered, "
                         "and path/to/file.py:function is judged too")  # fmt: skip
    return tuple(dict.fromkeys(found))


def one_of(kind: str, value: str, known: Sequence[str]) -> str:
    """`value` as it is written in `known`, whatever its case; UsageError with the nearest names otherwise."""
    for name in known:
        if name.lower() == value.lower():
            return name
    raise unknown(kind, value, list(known))


def dtypes(values: Iterable[str] | None) -> tuple[str, ...]:
    """The dtypes of --dtype under the names of the contract."""
    names = (contracts.DTYPE_ALIASES.get(name, name) for name in (v.removeprefix("torch.") for v in listed(values)))
    return tuple(dict.fromkeys(one_of("dtype", name, contracts.DTYPES) for name in names))


def one_dtype(value: str) -> str:
    """As `dtypes`, where one is wanted."""
    found = dtypes([value])
    if len(found) != 1:
        raise UsageError(f"--dtype is {value!r}, but should be one of {', '.join(contracts.DTYPES)}")
    return found[0]


def device_here(value: str) -> str:
    """As `one_of`, for a model that runs in this process (CannotJudge for cuda where there is none)."""
    import torch

    place = one_of("device", value, contracts.DEVICES)
    if place == "cuda" and not torch.cuda.is_available():
        raise CannotJudge("there is no CUDA device here, which --device cuda asks for; --device cpu does without")
    return place


def request(
    stage: str, device: str, dtype: Iterable[str] | None, profile: str, config: Iterable[str] | None, seed: int
) -> Request:
    """The checked form of what was asked; UsageError for any unknown name."""
    from moe_harness.fixtures.configs import shape

    one_of("stage", stage, ALL_STAGES)
    shapes = tuple(shape(one_of("config", name, _configs())) for name in listed(config))
    return Request(
        one_of("profile", profile, PROFILES), one_of("device", device, contracts.DEVICES),
        dtypes(dtype) or contracts.DTYPES, shapes, seed,
    )  # fmt: skip


def config_has_cases(stage: str, asked: Request, over_ranks: bool, option: str = "--config") -> None:
    """Raises UsageError where `option` adds no case to the plan of the stage: what is ignored seems to be judged."""
    from moe_harness.harness.core.plan import plan

    def adds(to: str) -> bool:
        return set(plan(to, asked)) != set(plan(to, replace(asked, configs=())))

    if asked.configs and (over_ranks or not adds(stage)):
        where = "over ranks" if over_ranks else f"to the stage {stage}"
        raise UsageError(f"{option} adds no cases {where}; it does to {', '.join(filter(adds, contracts.STAGES))}")


def at_least(option: str, value: float, least: float) -> None:
    """Raises UsageError where the number of an option is too small."""
    if value < least:
        raise UsageError(f"{option} is {value:g}, but should be at least {least:g}")


def known_checks(stage: str, asked: Request, over_ranks: bool = False) -> list[str]:
    """Names of the checks that a run of the stage makes."""
    if over_ranks or stage in contracts.RANK_STAGES:
        from moe_harness.harness.core.ranked_stage import find_ranked

        ranked = find_ranked(stage)
        return [*ranked.checks, *(["property"] if ranked.searches else [])]
    from moe_harness.harness.core.plan import plan

    return [*dict.fromkeys(planned.check for planned in plan(stage, asked)), "property"]


def chosen_checks(
    stage: str, asked: Request, checks: Iterable[str] | None, over_ranks: bool = False
) -> tuple[str, ...] | None:
    """Those of --check; None where all are wanted."""
    names = listed(checks)
    known = known_checks(stage, asked, over_ranks) if names else []
    return tuple(one_of(f"check of {stage}", name, known) for name in names) or None


def worlds_of(stage: str, ranks: Iterable[str] | None) -> tuple[int, ...]:
    """The world sizes that a stage is judged over; empty where it is judged on one device.

    Raises:
        UsageError: --ranks for a stage that no implementation of runs over ranks.
    """
    if ranks is None:
        return WORLDS if stage in contracts.RANK_STAGES else ()
    if stage not in contracts.OVER_RANKS:
        raise UsageError(f"--ranks is given, but {stage} is judged on one device; over ranks are "
                         f"{', '.join(contracts.OVER_RANKS)}")  # fmt: skip
    return worlds(ranks)


def worlds(values: Iterable[str]) -> tuple[int, ...]:
    """The world sizes of --ranks."""
    try:
        sizes = tuple(int(part) for part in listed(values))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1 or max(sizes) > 64:
        raise UsageError(f"--ranks is {','.join(values)!r}, but should be world sizes such as 1,2,4")
    return sizes


def writable(path: Path | None) -> None:
    """Find out before the run, not after it, that a result cannot be written (UsageError)."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        why = "it is a folder" if path.is_dir() else "its folder does not exist"
        raise UsageError(f"cannot write {path}: {why}")


def readable(path: Path | None, option: str = "--baseline") -> None:
    """Find out before the run that there is nothing to compare with (UsageError)."""
    if path is not None and not path.is_file():
        raise UsageError(f"{option} {path}: there is no such file; `moe-harness record --into {path} ...` makes it")


def tell(error: HarnessError, debug: bool) -> None:
    """The message of an error that ends the command, or one implementation of it."""
    if debug:
        traceback.print_exception(error)
    print(f"moe-harness: {error}", file=sys.stderr)
