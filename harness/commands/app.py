"""The command `moe-harness`.  It imports no torch: implementations are loaded and judged in worker processes."""

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated

import typer

from moe_harness.harness.commands.audit import audit
from moe_harness.harness.commands.bench import bench
from moe_harness.harness.commands.bisect import bisect
from moe_harness.harness.commands.check import check
from moe_harness.harness.commands.compare import compare
from moe_harness.harness.commands.explain import explain
from moe_harness.harness.commands.faults import faults
from moe_harness.harness.commands.gate import app as gate
from moe_harness.harness.commands.generate import generate
from moe_harness.harness.commands.init import init
from moe_harness.harness.commands.list import list_
from moe_harness.harness.commands.options import tell
from moe_harness.harness.commands.record import OPTIONS_OF_OTHERS, record
from moe_harness.harness.commands.replay import replay
from moe_harness.harness.commands.tune import tune
from moe_harness.harness.core.blame import machine_trouble, out_of
from moe_harness.harness.core.errors import EXIT_CANNOT_JUDGE, HarnessError

app = typer.Typer(
    name="moe-harness",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Judge Mixture-of-Experts kernels: is it right, on which inputs is it wrong, and why?",
)
COMMANDS: dict[str, Callable[..., None]] = {
    "check": check, "init": init, "explain": explain, "list": list_, "replay": replay, "faults": faults,
    "audit": audit, "bench": bench, "tune": tune, "record": record, "compare": compare, "generate": generate,
    "bisect": bisect,
}  # fmt: skip
for name, command in COMMANDS.items():
    app.command(name, context_settings=OPTIONS_OF_OTHERS if command is record else None)(command)
app.add_typer(gate, name="gate")


def _version(asked: bool) -> None:
    if asked:
        from moe_harness.harness.commands.version import version_lines

        print("\n".join(version_lines()))
        raise typer.Exit()


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", help="Print the versions that matter and leave.", callback=_version)
    ] = False,
) -> None:
    """Judge Mixture-of-Experts kernels: is it right, on which inputs is it wrong, and why?"""


def main() -> None:
    """Entry point: exit status 0, 1, 2 or 3 as the contract says, and no traceback without --debug."""
    debug = "--debug" in sys.argv
    try:
        try:
            app()
        finally:
            _flush()
    except HarnessError as error:
        tell(error, debug)
        sys.exit(error.exit_status)
    except KeyboardInterrupt:
        sys.exit(EXIT_CANNOT_JUDGE)
    except Exception as error:
        if debug:
            raise
        lacking = machine_trouble(error)
        told = f": {out_of(lacking)}" if lacking else f" failed: {type(error).__name__}: {error} (--debug shows where)"
        print(f"moe-harness{told}", file=sys.stderr)
        _give_up_output()
        sys.exit(EXIT_CANNOT_JUDGE)


def _flush() -> None:
    """Write what is left: a full disk under it is told then, where at Python's end it would be status 120.

    Whoever reads no further, as `| head`, leaves the status as it is.
    """
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _give_up_output()


def _give_up_output() -> None:
    """Let go of what standard output holds and can't take, which Python would try to write once more at its end."""
    with suppress(OSError, ValueError):  # it may be no file, or closed
        try:
            sys.stdout.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
