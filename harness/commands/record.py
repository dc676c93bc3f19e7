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
OPTIONS_OF_OTHERS = {"ignore_unknown_options": True}  # those of the command that is run, with -- before it or without


def record(
    what: Annotated[
        list[str], typer.Argument(metavar="RESULT.json... | COMMAND", help="Results, or a command with its options.")
    ],
    into: Annotated[Path, typer.Option("--into", help="Add to this file, JSON lines.")] = Path("runs.jsonl"),
) -> None:
    """Keep results: of JSON that was written, or of a command that is run now (`record check --stage ...`).

    With a command the status is the command's own; what it found is kept where it judged anything.
    """
    from moe_harness.harness.record import line, store, view

    options.writable(into)
    if what[0] in RECORDED:
        raise typer.Exit(_run(what, into))
    if unknown := [word for word in what if word.startswith("-")]:
        raise UsageError(
            f"record has no option {unknown[0]}, only --into FILE; options of a command stand behind its name "
            f"({', '.join(RECORDED)}): moe-harness record --into FILE check --stage experts ..."
        )
    found = [entry for path in what for entry in line.lines(_json(Path(path)))]
    print(f"{view.counted(store.append(into, found), 'result')} added to {into}")


def _run(command: list[str], into: Path) -> int:
    from moe_harness.harness.record import line, store, view

    with tempfile.TemporaryDirectory(prefix="recorded-") as folder:
        written, asked = _own_json(command), command
        if written is None:
            written = Path(folder) / "result.json"
            asked = [*command, "--json", str(written)]
        before = _stamp(written)
        status = subprocess.run([sys.executable, "-m", "moe_harness", *asked]).returncode
        if status not in (EXIT_PASS, EXIT_FAIL) and _stamp(written) == before:  # an older run's result may lie there
            return status
        kept = store.append(into, line.lines(_json(written), "moe-harness " + " ".join(command)))
        print(f"{view.counted(kept, 'result')} added to {into}", file=sys.stderr)
    return status


def _stamp(path: Path) -> int | None:
    """When a file was last written; None where there is none."""
    return path.stat().st_mtime_ns if path.is_file() else None


def _own_json(command: list[str]) -> Path | None:
    """The file that the command itself asks for: `--json FILE` or `--json=FILE`."""
    for word, following in zip(command, [*command[1:], ""], strict=True):
        if word == "--json" or word.startswith("--json="):
            return Path(word.partition("=")[2] or following)
    return None


def _json(path: Path) -> object:
    if not path.is_file():
        raise UsageError(f"there is no file {path}; wanted is what --json of {', '.join(RECORDED)} wrote, or such a "
                         f"command itself: moe-harness record check --stage experts --impl triton")  # fmt: skip
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise CannotJudge(f"{path} is not JSON: {error}") from error
