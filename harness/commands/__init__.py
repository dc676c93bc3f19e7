"""Commands of `moe-harness` that have a file of their own; `harness.cli` registers them."""

from pathlib import Path
from typing import Annotated

import typer

from moe_harness.harness.errors import UsageError

Device = Annotated[str, typer.Option("--device", help="cpu or cuda.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback behind a message.")]


def writable(path: Path | None) -> None:
    """Find out before the run, not after it, that a result cannot be written (UsageError)."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        why = "it is a folder" if path.is_dir() else "its folder does not exist"
        raise UsageError(f"cannot write {path}: {why}")
