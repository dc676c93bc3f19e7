"""The stages, the signatures their implementations have, and how an implementation is found by its spec.

A spec is a registered name (`torch:loop`, `triton`), `package.module:attribute` or `path/to/file.py:attribute`.
Registered names follow a rule instead of a table: `family:variant` of stage S is `impls.family.S:variant`, and
`family` alone is `impls.family.S:S`.  This module imports neither torch nor any implementation until `load` is called.
"""

import ast
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moe_harness.harness.core.blame import hand_over
from moe_harness.harness.core.environment import how_to_install
from moe_harness.harness.core.errors import CannotJudge, HarnessError, UsageError, unknown
from moe_harness.harness.core.folders import extra_folders, needed_part, stages_with

DTYPES = ("fp32", "fp16", "bf16")
DEVICES = ("cpu", "cuda")
ROUNDINGS = ("gate_up", "activation", "expert_output", "weighted", "partial_sum", "routing_weight")
# Beyond the contract's six: products of fp32 operands rounded to tf32 first, which has to be declared to be accepted.
DECLARED_ROUNDINGS = (*ROUNDINGS, "tf32")
KEPT = ".pkl"  # of a file that holds a function object; see harness.run.functions
REJECTIONS = (NotImplementedError, ValueError, TypeError)

DTYPE_ALIASES = {"float32": "fp32", "float": "fp32", "float16": "fp16", "half": "fp16", "bfloat16": "bf16"}


STAGES = stages_with("contract")
SIGNATURES: dict[str, inspect.Signature] = {
    stage: inspect.signature(getattr(needed_part(stage, "contract"), stage)) for stage in STAGES
}
RANK_STAGES = ("dispatcher", "parallel_linear")  # classes, one object per rank; see harness.ranks


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

    @classmethod
    def of(cls, function: Callable) -> "Declarations":
        """Read the attributes of `function`; a value outside the contract is a UsageError that names it."""
        found = {name: getattr(function, name) for name in cls.__dataclass_fields__ if hasattr(function, name)}
        found = {name: value for name, value in found.items() if value is not None and name != "explicit"}
        for name, known in (("dtypes", DTYPES), ("devices", DEVICES), ("rounds", DECLARED_ROUNDINGS)):
            if name in found:
                found[name] = _names(name, found[name], known)
        for name in ("deterministic", "batch_invariant", "graph_capturable"):
            if name in found and not isinstance(found[name], bool):
                raise UsageError(f"the attribute {name!r} is {found[name]!r}, but should be True or False")
        return cls(**found, explicit=tuple(sorted(found)))

    def as_dict(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


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
    function = find(stage, spec)
    if not callable(function) or isinstance(function, type):
        kind = "a class" if isinstance(function, type) else type(function).__name__
        raise UsageError(
            f"{spec!r} is {kind}, but should be a function (or an object that can be called) with the signature\n"
            f"  {stage}{SIGNATURES[stage]}"
        )
    return Subject(stage, spec, function, Declarations.of(function), _check_signature(stage, spec, function))


def registered(stage: str) -> dict[str, str]:
    """Registered names of a stage and where each lives, read from `__all__` without importing anything.

    That is a module of moe_harness.impls, or the file of a folder that MOE_HARNESS_PATH adds.
    """
    found: dict[str, str] = {}
    ours = _impls_folder()
    for folder in (ours, *extra_folders("impls")):
        for file in sorted(folder.glob(f"*/{stage}.py")):
            family = file.parent.name
            for variant in _exported(file):
                name = family if variant == stage else f"{family}:{variant}"
                found.setdefault(name, f"moe_harness.impls.{family}.{stage}" if folder == ours else str(file))
    return found


def _impls_folder() -> Path:
    spec = importlib.util.find_spec("moe_harness.impls")
    locations = list(spec.submodule_search_locations or []) if spec else []
    return Path(locations[0]) if locations else Path("impls")


def _exported(file: Path) -> list[str]:
    for node in ast.parse(file.read_text()).body:
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
        from moe_harness.harness.run.functions import load_kept

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
    return None if takes_any else frozenset(signature.parameters)
