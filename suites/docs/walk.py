"""The files that a value walks through from a spec to a verdict: those of the judge in which a function runs.

python -m moe_harness.suites.docs.walk [STAGE SPEC CASE]      prints them, of the controller and of a judging process

Counted is a run that passes, of one case, without what only importing a module executes.  A climb is a call of a file
that knows the caller's: a stage asked by what all stages share, a listener.
"""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

from moe_harness.harness.commands.app import main
from moe_harness.suites.imports import FILES, KNOWS, ROOT

EXAMPLE = ("shared_expert_gate", "torch:loop", "shared_expert_gate/contract/lead=3")
HARNESS = ROOT / "harness"


@dataclass
class Walk:
    """Files of the judge, from harness/, and who called whom."""

    files: set[str] = field(default_factory=set)
    calls: set[tuple[str, str]] = field(default_factory=set)

    def climbs(self) -> list[tuple[str, str]]:
        """Calls of a file that imports the caller's, itself or through others."""
        return sorted((caller, callee) for caller, callee in self.calls if caller in _known(callee))


def _known(file: str) -> set[str]:
    """Files of the judge that one reaches by imports."""
    modules = {str(path.relative_to(HARNESS)): name for name, path in FILES.items() if HARNESS in path.parents}
    files = {name: file for file, name in modules.items()}
    found, left = set[str](), [modules[file]]
    while left:
        new = {name for name in KNOWS[left.pop()] if name in files} - found
        found |= new
        left += new
    return {files[name] for name in found}


@contextmanager
def walked(walk: Walk) -> Iterator[None]:
    """Note every file of the judge in which a function runs meanwhile, in any thread."""
    places: dict[str, str | None] = {}

    def place(name: str) -> str | None:
        if name not in places:
            path = Path(name).resolve()
            places[name] = str(path.relative_to(HARNESS)) if HARNESS in path.parents else None
        return places[name]

    def note(frame: FrameType, event: str, _: Any) -> None:
        file = place(frame.f_code.co_filename) if event == "call" else None
        if file is None or frame.f_code.co_name == "<module>":
            return
        caller, frames = None, frame.f_back
        while frames is not None:
            other = place(frames.f_code.co_filename)
            if other is not None and frames.f_code.co_name == "<module>":
                return  # a decorator or a table that an import makes
            caller, frames = caller or other, frames.f_back
        walk.files.add(file)
        if caller is not None and caller != file:
            walk.calls.add((caller, file))

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        yield
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]


def of_controller(stage: str, spec: str, case: str) -> Walk:
    """What `moe-harness check` goes through itself, with one check."""
    walk, said = Walk(), StringIO()
    arguments = ["moe-harness", "check", "--stage", stage, "--impl", spec, "--check", case.split("/")[1]]
    quiet = redirect_stdout(said), redirect_stderr(said)
    with patch.object(sys, "argv", arguments), quiet[0], quiet[1], walked(walk), suppress(SystemExit):
        main()
    if "PASS" not in said.getvalue():
        raise RuntimeError(f"no run that passes:\n{said.getvalue()}")
    return walk


def of_process(stage: str, spec: str, case: str) -> Walk:
    """What a judging process goes through: loaded, and one case judged."""
    from moe_harness.harness.process import worker

    class Heard:
        send: Callable[[object], None] = staticmethod(lambda word: None)

    walk = Walk()
    with walked(walk):
        trial = worker._loaded(Heard(), stage, spec, "cpu")  # type: ignore[arg-type]
        assert trial is not None
        answer = worker.judge_id(trial, case)
    assert answer.status == "passed", answer
    return walk


if __name__ == "__main__":
    told = tuple(sys.argv[1:]) or EXAMPLE
    both = {"controller": of_controller(*told), "judging process": of_process(*told)}
    for where, found in both.items():
        print(f"{where}: {len(found.files)} files, {len(found.climbs())} climbs")
        print(*(f"  {file}" for file in sorted(found.files)), sep="\n")
        print(*(f"  climb: {caller} -> {callee}" for caller, callee in found.climbs()), sep="\n")
    print(f"together: {len(set.union(*(found.files for found in both.values())))} files")
