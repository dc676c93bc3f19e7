"""How an implementation is found by its spec.

A spec is a registered name (`torch:loop`, `triton`), `package.module:attribute` or `path/to/file.py:attribute`.
Registered names follow a rule instead of a table: in a package of implementations, `library:variant` of stage S is the
attribute `variant` of `library/S.py`, and `library` alone is its attribute S.  Such packages are this project's own,
those that installed distributions name in the entry point group `moe_harness.impls`, and folders in MOE_HARNESS_PATH.
Nothing is imported until it is asked for.
"""

import ast
import functools
import hashlib
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from moe_harness.harness.core.environment import how_to_install
from moe_harness.harness.core.errors import CannotJudge, HarnessError, UsageError, unknown

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


OURS = "moe_harness.impls"  # the only place that names it; nothing of the harness imports it
GROUP = "moe_harness.impls"
# A literal list, as it is nearly always written: parsing the modules of a stage took 0.1 s in every process.
ALL = re.compile(r"^__all__ = (\[[^\[\]]*\])$", re.MULTILINE)
KEPT = ".pkl"  # of a file that holds a function object; see harness.core.functions


def registered(stage: str) -> dict[str, str]:
    """Registered names of a stage and where each lives, read from `__all__` without importing anything.

    That is a module of a package of implementations, or the file of a folder that MOE_HARNESS_PATH adds.
    """
    found: dict[str, str] = {}
    for package, folder in _libraries():
        for file in sorted(folder.glob(f"*/{stage}.py")):
            family = file.parent.name
            for variant in _exported(file):
                name = family if variant == stage else f"{family}:{variant}"
                found.setdefault(name, f"{package}.{family}.{stage}" if package else str(file))
    return found


def companion(library: str, name: str) -> Any:
    """The module `name` beside the implementations of a library, such as what tunes them.

    Raises:
        UsageError: no library has one of that name, or not this one.
    """
    found = {
        file.parent.name: (package, file) for package, folder in _libraries() for file in folder.glob(f"*/{name}.py")
    }
    if library not in found:
        raise unknown(f"library with a module {name}", library, sorted(found))
    package, file = found[library]
    return _import(library, f"{package}.{library}.{name}") if package else _import_file(library, file)


def _libraries() -> list[tuple[str, Path]]:
    """(package, folder) of implementations: ours, those of installed packages, folders of MOE_HARNESS_PATH ("")."""
    packages = [OURS, *(entry.value for entry in entry_points(group=GROUP))]
    specs = [(name, importlib.util.find_spec(name)) for name in dict.fromkeys(packages) if _module_exists(name)]
    installed = [
        (name, Path(where)) for name, s in specs if s for where in list(s.submodule_search_locations or [])[:1]
    ]
    return [*installed, *(("", folder) for folder in extra_folders("impls"))]


def _exported(file: Path) -> list[str]:
    text = file.read_text()
    if (plain := ALL.search(text)) is not None:
        return list(ast.literal_eval(plain[1]))
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and any(getattr(t, "id", None) == "__all__" for t in node.targets):
            return list(ast.literal_eval(node.value))
    return []


def find(stage: str, spec: str) -> Any:
    """The attribute that `spec` names, unchecked; raises as `load` does."""
    names = registered(stage)
    if spec in names:
        family, _, variant = spec.partition(":")
        home = names[spec]
        module = _import_file(spec, Path(home)) if home.endswith(".py") else _import(spec, home)
        return getattr(module, variant or stage)
    target, colon, attribute = spec.rpartition(":")
    if not colon:
        if spec.endswith(".py"):
            raise UsageError(f"implementation {spec!r} names a file only; write {spec}:FUNCTION")
        raise _unknown_implementation(stage, spec, names)
    if target in {name.partition(":")[0] for name in names}:  # a family of ours, whatever else has that name
        raise _unknown_implementation(stage, spec, names)
    if target.endswith(".py"):
        return _attribute(spec, _import_file(spec, Path(target)), attribute)
    if target.endswith(KEPT):
        from moe_harness.harness.core.functions import load_kept

        return load_kept(spec, Path(target))
    import_from(Path.cwd())
    if _module_exists(target):
        return _attribute(spec, _import(spec, target), attribute)
    raise _unknown_implementation(stage, spec, names)


def _unknown_implementation(stage: str, spec: str, names: dict[str, str]) -> UsageError:
    message = str(unknown(f"{stage} implementation", spec, list(names)))
    return UsageError(
        f"{message}\nan implementation is a registered name (moe-harness list --stage {stage}), "
        "package.module:function or path/to/file.py:function"
    )


def _module_exists(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False
    except Exception:  # a parent package that fails while importing: let the import itself tell the story
        return True


def _import(spec: str, module: str) -> Any:
    with _telling_import_errors(spec, module):
        return importlib.import_module(module)


def _import_file(spec: str, path: Path) -> Any:
    if not path.is_file():
        near = [str(p) for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        beside = f"; files there: {', '.join(sorted(near)[:5])}" if near else ""
        raise UsageError(f"implementation {spec!r}: there is no file {path}{beside}")
    # The name is unique per file, so that two files called kernel.py do not share one entry in sys.modules.
    name = f"{path.stem}_{hashlib.sha1(str(path.resolve()).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    module_spec = importlib.util.spec_from_file_location(name, path.resolve())
    if module_spec is None or module_spec.loader is None:
        raise UsageError(f"implementation {spec!r}: {path} is no Python file")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module
    try:
        import_from(path.resolve().parent)
        with _telling_import_errors(spec, str(path)):
            module_spec.loader.exec_module(module)
    except HarnessError:
        del sys.modules[name]
        raise
    return module


def import_from(folder: Path) -> None:
    """Let what lies in the folder go before what is installed, as it does for a script there; calls import too."""
    if sys.path[:1] != [str(folder)]:
        sys.path.insert(0, str(folder))


class _telling_import_errors:
    """Turns whatever an import raises into a CannotJudge that says where in the user's code it happened."""

    def __init__(self, spec: str, what: str):
        self.spec, self.what = spec, what

    def __enter__(self):
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if error is None or isinstance(error, HarnessError | KeyboardInterrupt):
            return
        frame = traceback
        while frame.tb_next is not None:
            frame = frame.tb_next
        where = f"{frame.tb_frame.f_code.co_filename}:{frame.tb_lineno}"
        if isinstance(error, SyntaxError):
            where = f"{error.filename}:{error.lineno}"
        advice = f"importing {self.what} has to work by itself first"
        if isinstance(error, ModuleNotFoundError):
            advice = how_to_install(error) or advice
        raise CannotJudge(
            f"implementation {self.spec!r} cannot be imported: {kind.__name__}: {error}\n"
            f"  raised at {where}\n  {advice}"
        ) from error


def _attribute(spec: str, module: Any, attribute: str) -> Any:
    """`attribute` of the module; `Class.method` too."""
    found = module
    for name in attribute.split("."):
        if not hasattr(found, name):
            break
        found = getattr(found, name)
    else:
        return found
    functions = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
    raise UsageError(f"implementation {spec!r}: {unknown('attribute', attribute, functions)}")
