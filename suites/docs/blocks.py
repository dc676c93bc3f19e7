"""Output blocks of the pages, written by the commands above them.

    <!-- output: moe-harness init experts -->
    ```
    (what the command prints)
    ```

python -m moe_harness.suites.docs.blocks            runs every command and rewrites the blocks and docs/report.svg

Commands run one after the other in a folder that holds docs/examples, in a terminal of 88 columns.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from moe_harness.harness.report import print_report
from moe_harness.suites.plugin import PLUGIN

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md"))))
BLOCK = re.compile(r"(?P<head><!-- output: (?P<command>.+?) -->\n```\n)(?P<output>.*?)(?P<tail>```\n)", re.DOTALL)
NUMBERS = re.compile(r"[-+]?\d[\d.,]*(?:e[-+]?\d+)?|\binf\b|\bnan\b")
PICTURE = ROOT / "docs" / "report.svg"
PICTURED = ("--stage", "experts", "--impl", "many_experts.py:fused", "--check", "contract,sentinels,numeric")
COLUMNS = "88"


def folder() -> tempfile.TemporaryDirectory:
    """A fresh folder with the examples and a `moe-harness` that runs this tree."""
    made = tempfile.TemporaryDirectory()
    for file in (ROOT / "docs" / "examples").glob("*.py"):
        shutil.copy(file, made.name)
    script = Path(made.name) / "bin" / "moe-harness"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m moe_harness "$@"\n')
    script.chmod(0o755)
    for name, program in {"python": "", "pytest": "-m pytest"}.items():
        (script.parent / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {program} "$@"\n')
        (script.parent / name).chmod(0o755)
    return made


def run(command: str, place: str) -> str:
    """What the command prints on standard output."""
    path = f"{place}/bin{os.pathsep}{os.environ['PATH']}"
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "GITHUB"))}
    env = kept | {"PATH": path, "PYTHONPATH": str(ROOT), "COLUMNS": COLUMNS, "NO_COLOR": "1"}
    env["PYTEST_ADDOPTS"] = " ".join(PLUGIN)
    done = subprocess.run(["bash", "-c", command], cwd=place, env=env, capture_output=True, text=True, timeout=560)
    lines = [line.rstrip() for line in done.stdout.splitlines()]
    return "\n".join(lines).strip("\n") + "\n"


def blocks(page: str) -> Iterator[tuple[str, str]]:
    """(command, output) of a page."""
    for found in BLOCK.finditer((ROOT / page).read_text(encoding="utf-8")):
        yield found["command"], found["output"]


def masked(text: str) -> list[str]:
    """The words without numbers, which differ from one processor to the next: times, values, versions."""
    return NUMBERS.sub("#", text).split()


def picture(place: str) -> str:
    """The report of the pictured run as SVG."""
    run(f"moe-harness check {' '.join(PICTURED)} --json pictured.json", place)
    result = json.loads((Path(place) / "pictured.json").read_text())
    result["failures"] = result["failures"][:1]  # the report's head; the rest is more of the same
    result["coverage"]["axes"], result["observations"] = {}, []
    console = Console(record=True, width=100, file=open(os.devnull, "w"))  # noqa: SIM115 - closed with the process
    print_report([result], console)
    svg = console.export_svg(title="moe-harness check " + " ".join(PICTURED), unique_id="report")
    return re.sub(r"@font-face \{.*?\}\n?", "", svg, flags=re.DOTALL)  # fonts of another site; a monospace one will do


def main() -> None:
    """Rewrite every block and the picture."""
    with folder() as place:
        for page in PAGES:
            text = (ROOT / page).read_text(encoding="utf-8")
            new = BLOCK.sub(lambda found: found["head"] + run(found["command"], place) + found["tail"], text)
            (ROOT / page).write_text(new, encoding="utf-8")
        PICTURE.write_text(picture(place), encoding="utf-8")


if __name__ == "__main__":
    main()
