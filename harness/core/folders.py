"""Where stages are found: a folder of harness/stages each, and of every folder in MOE_HARNESS_PATH; no torch here.

`MOE_HARNESS_PATH` names folders (as PATH does) that are laid out as this tree is: `stages/<stage>/` adds a stage, and
`impls/<library>/<stage>.py` registers implementations, without an edit of either tree.
"""

import functools
import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

PACKAGE = "moe_harness.harness.stages"


def extra_folders(kind: str) -> list[Path]:
    """The folders called `kind` ("stages", "impls") that MOE_HARNESS_PATH adds."""
    named = filter(None, os.environ.get("MOE_HARNESS_PATH", "").split(os.pathsep))
    return [Path(folder).absolute() / kind for folder in named]


def stages_with(part: str) -> tuple[str, ...]:
    """Names of the stages whose folder holds `part`, a module or a package, in the order of the alphabet."""
    return tuple(sorted(name for name, folder in _folders().items() if _holds(folder, part)))


def stage_part(stage: str, part: str) -> ModuleType | None:
    """The module `part` of a stage's folder; None where the stage has none."""
    folder = _folders().get(stage)
    if folder is None or not _holds(folder, part):
        return None
    return importlib.import_module(f"{PACKAGE}.{stage}.{part}")


def needed_part(stage: str, part: str) -> ModuleType:
    """As `stage_part` for what every stage has.

    Raises:
        LookupError: the stage's folder lacks it, or there is no such folder.
    """
    found = stage_part(stage, part)
    if found is None:
        raise LookupError(f"the stage {stage!r} should have a module {part}.py in its folder of harness/stages")
    return found


def modules_of(stage: str, part: str) -> tuple[str, ...]:
    """Full names of the modules in the package `part` of a stage, or of the module itself where it is one."""
    folder = _folders().get(stage)
    if folder is None or not _holds(folder, part):
        return ()
    files = sorted((folder / part).glob("[!_]*.py"))
    return tuple(f"{PACKAGE}.{stage}.{part}.{file.stem}" for file in files) or (f"{PACKAGE}.{stage}.{part}",)


@functools.cache
def _folders() -> dict[str, Path]:
    path: Sequence[str] = importlib.import_module(PACKAGE).__path__
    found = [f for root in path if Path(root).is_dir() for f in Path(root).iterdir() if (f / "__init__.py").is_file()]
    return {folder.name: folder for folder in reversed(found)}


@functools.cache
def _holds(folder: Path, part: str) -> bool:
    return (folder / f"{part}.py").is_file() or (folder / part / "__init__.py").is_file()
