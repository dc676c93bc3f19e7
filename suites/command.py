"""The command line, run inside the test's own process: its fork server has torch already, 0.1 s and not 3 s."""

import contextlib
import io
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from moe_harness.harness.commands.app import main


@dataclass(frozen=True)
class Done:
    """What a command came to."""

    returncode: int
    stdout: str
    stderr: str


def run(folder: Path, *arguments: object, **environment: str) -> Done:
    """`moe-harness ARGUMENTS` in `folder`, with `environment` beside the test's own."""
    out, err = io.StringIO(), io.StringIO()
    line, told = ["moe-harness", *map(str, arguments)], {"COLUMNS": "80", **environment}
    with (
        contextlib.chdir(folder), mock.patch.object(sys, "argv", line), mock.patch.dict(os.environ, told),
        contextlib.redirect_stdout(out), contextlib.redirect_stderr(err),
    ):  # fmt: skip
        try:
            main()
            code: object = 0
        except SystemExit as ended:
            code = ended.code
    return Done(code if isinstance(code, int) else 0 if code is None else 1, out.getvalue(), err.getvalue())


def run_apart(folder: Path, *arguments: object, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """As `run`, in a process of its own, as a shell does."""
    command = [sys.executable, "-m", "moe_harness", *map(str, arguments)]
    env = os.environ | {"PYTHONPATH": os.getcwd()}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=timeout, check=False)
