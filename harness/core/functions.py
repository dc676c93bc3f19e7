"""How a function object reaches the judging process: by a spec where it has one, as a file with the function otherwise.

A function of a module is named; one of a notebook, of a script (`__main__`) or of another function is kept by value, in
`.moe_harness/functions/`, with the source of what no file holds: Triton reads the source of its kernels.
"""

import hashlib
import linecache
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_harness.harness.core.errors import CannotJudge, UsageError
from moe_harness.harness.core.kept import folder
from moe_harness.harness.core.registry import KEPT


def spec_of(function: Callable) -> str:
    """The spec that names `function` for another process of this machine.

    Raises:
        UsageError: it is nothing that can be called, or holds what cannot be pickled.
    """
    if not callable(function):
        raise UsageError(f"what is to be judged is {type(function).__name__}, but should be a function or a spec")
    return _named(function) or _kept(function)


def _named(function: Callable) -> str | None:
    """file.py:function or module:function, where that leads back to the same object."""
    name, module = getattr(function, "__qualname__", ""), sys.modules.get(getattr(function, "__module__", None) or "")
    if module is None or module.__name__ == "__main__" or _found(module, name) is not function:
        return None
    file = getattr(module, "__file__", None)
    if "." in module.__name__ or file is None or not file.endswith(".py"):
        return f"{module.__name__}:{name}"
    path = os.path.relpath(file)
    return f"{file if path.startswith('..') else path}:{name}"


def _found(module: Any, qualified: str) -> Any:
    for name in qualified.split("."):
        module = getattr(module, name, None)
    return module


def _kept(function: Callable) -> str:
    import cloudpickle

    name = getattr(function, "__name__", type(function).__name__)
    try:
        data = cloudpickle.dumps((function, _sources(function)))
    except Exception as error:
        raise UsageError(f"{name} cannot be carried to another process ({type(error).__name__}: {error}); "
                         "put it into a file and judge path/to/file.py:function") from error  # fmt: skip
    plain = "".join(letter if letter.isalnum() else "_" for letter in name)
    path = folder("functions") / f"{plain}-{hashlib.sha1(data).hexdigest()[:8]}{KEPT}"
    path.write_bytes(data)
    return f"{path}:{plain}"


def _sources(function: Callable) -> dict[str, list[str]]:
    """Lines of the cells whose code the function may reach; a file is read where it lies."""
    held = {**getattr(function, "__globals__", {}), **vars(sys.modules["__main__"])}
    codes = [getattr(getattr(value, "fn", value), "__code__", None) for value in [function, *held.values()]]
    names = {code.co_filename for code in codes if code is not None}
    return {name: linecache.getlines(name) for name in names if not Path(name).is_file() and linecache.getlines(name)}


def load_kept(spec: str, path: Path) -> Any:
    """The function that `spec_of` kept at `path`.

    Raises:
        UsageError: there is no such file.
        CannotJudge: what it refers to cannot be imported here.
    """
    import cloudpickle

    if not path.is_file():
        raise UsageError(f"implementation {spec!r}: there is no file {path}; judge the function anew to keep it")
    try:
        function, sources = cloudpickle.loads(path.read_bytes())
    except Exception as error:
        raise CannotJudge(f"implementation {spec!r} cannot be loaded: {type(error).__name__}: {error}") from error
    for name, lines in sources.items():
        linecache.cache[name] = (sum(map(len, lines)), None, lines, name)
    return function
