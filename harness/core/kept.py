"""What a run leaves for the next one, in `.moe_harness/` of the current folder: functions, and what failed last."""

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

NAME = ".moe_harness"


def folder(name: str) -> Path:
    """The folder of that name, made where it is missing; in the temporary folder where the current one is read-only."""
    for base in (Path(NAME), Path(tempfile.gettempdir()) / NAME):
        try:
            (base / name).mkdir(parents=True, exist_ok=True)
            (base / ".gitignore").write_text("*\n")
        except OSError:
            continue
        return base / name
    raise OSError(f"neither {Path.cwd()} nor {tempfile.gettempdir()} can be written")


def _file() -> Path:
    return folder("last") / "failed.json"


def _read() -> dict[str, list[str]]:
    try:
        return json.loads(_file().read_text())
    except (OSError, ValueError):
        return {}


def remember_failed(results: Iterable[Any]) -> None:
    """Keep the failing cases of each implementation; a run that could not be kept is no failure of the run."""
    try:
        known = _read()
        for result in results:
            known[_key(result["stage"], result["impl"])] = [failure["case"] for failure in result["failures"]]
        _file().write_text(json.dumps(known, indent=1))
    except OSError:
        pass


def last_failed(stage: str, spec: str) -> tuple[str, ...]:
    """The cases that failed when the implementation was judged last; empty where none did, or none is known."""
    return tuple(_read().get(_key(stage, spec), ()))


def _key(stage: str, spec: str) -> str:
    return f"{stage} {spec}"
