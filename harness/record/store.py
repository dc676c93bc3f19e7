"""Lines in a file: appended one by one, read back with what is wrong told."""

import json
from collections.abc import Iterable
from pathlib import Path

from moe_harness.harness.core.errors import CannotJudge, UsageError
from moe_harness.harness.record.line import SCHEMA, Line, lines


def append(path: Path, found: Iterable[Line]) -> int:
    """Add lines to a file, which is made where there is none; how many."""
    text = [json.dumps(line, allow_nan=False) + "\n" for line in found]
    with path.open("a", encoding="utf-8") as file:
        file.writelines(text)
    return len(text)


def read(path: Path) -> list[Line]:
    """The lines of a file in the order in which they were recorded; the JSON that a command wrote will do as well.

    Raises:
        UsageError: no such file, or neither of the two.
        CannotJudge: a line that was cut off.
    """
    if not path.is_file():
        raise UsageError(f"there is no file {path}; `moe-harness record --into {path} check ...` makes one")
    text = path.read_text("utf-8")
    try:
        whole = json.loads(text)
        if not (isinstance(whole, dict) and "recorded" in whole):
            return lines(whole)
    except ValueError:
        pass
    found = []
    for number, row in enumerate(text.splitlines(), 1):
        try:
            line = json.loads(row)
        except ValueError as error:
            raise CannotJudge(f"{path}, line {number} is not JSON ({error}); was it cut off?") from error
        if not isinstance(line, dict) or line.get("schema") != SCHEMA or "kind" not in line:
            raise UsageError(f"{path}, line {number} is no record of schema {SCHEMA}")
        found.append(line)
    if not found:
        raise UsageError(f"{path} is empty")
    return found


def newest(found: Iterable[Line]) -> dict[tuple[str, str], Line]:
    """The last line of each kind and name."""
    return {(line["kind"], line["name"]): line for line in found}
