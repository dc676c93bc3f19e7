"""`moe-harness record`: keep what a run found, so that later ones can be compared with it."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from moe_harness.harness.commands import options
from moe_harness.harness.core.errors import EXIT_FAIL, EXIT_PASS, CannotJudge, UsageError

RECORDED = ("check", "bench", "gate", "faults")


def record(
    what: Annotated[
        list[str], typer.Argument(metavar="RESULT.json... | -- COMMAND", help="Results, or a command behind --.")
    ],
    into: Annotated[Path, typer.Option("--into", help="Add to this file, JSON lines.")] = Path("runs.jsonl"),
) -> None:
    """Keep results: of JSON that was written, or of a command that is run now (`record -- check --stage ...`).

    With a command the status is the command's own; what it found is kept where it judged anything.
    """
    from moe_harness.harness.record import line, store

    options.writable(into)
    if what[0] in RECORDED:
        raise typer.Exit(_run(what, into))
    found = [entry for path in what for entry in line.lines(_json(Path(path)))]
    print(f"{store.append(into, found)} results added to {into}")


def _run(command: list[str], into: Path) -> int:
    from moe_harness.harness.record import line, store

    with tempfile.TemporaryDirectory(prefix="recorded-") as folder:
        written = Path(folder) / "result.json"
        asked = [*command, "--json", str(written)]
        if "--json" in command:
            written = Path(command[command.index("--json") + 1])
            asked = command
        status = subprocess.run([sys.executable, "-m", "moe_harness", *asked]).returncode
        if status not in (EXIT_PASS, EXIT_FAIL) and not written.is_file():
            return status
        kept = store.append(into, line.lines(_json(written), "moe-harness " + " ".join(command)))
        print(f"{kept} results added to {into}", file=sys.stderr)
    return status


def _json(path: Path) -> object:
    if not path.is_file():
        raise UsageError(f"there is no file {path}; wanted is what --json of {', '.join(RECORDED)} wrote, or a command "
                         f"behind --, such as `moe-harness record -- check --stage experts --impl triton`")  # fmt: skip
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise CannotJudge(f"{path} is not JSON: {error}") from error
