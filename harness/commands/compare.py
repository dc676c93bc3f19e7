"""`moe-harness compare A B`: what got worse from one run to another."""

from pathlib import Path
from typing import Annotated

import typer

from moe_harness.harness.commands import options
from moe_harness.harness.core.errors import EXIT_CANNOT_JUDGE, EXIT_FAIL, EXIT_PASS, UsageError


def compare(
    runs: Annotated[
        list[Path], typer.Argument(metavar="A B", help="Files of `record`, or what --json wrote; more for a picture.")
    ],
    json: Annotated[Path | None, typer.Option("--json", help="Write what differs here.")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write a page with the two runs side by side.")] = None,
    picture: Annotated[Path | None, typer.Option("--picture", help="Draw all runs of all files, SVG or PNG.")] = None,
) -> None:
    """Compare the newest result of each name in the last file with that in the one before it.

    Ends with 1 on a regression and with 0 where none is shown.  One file is compared with itself: its newest results
    with those before them.
    """
    from json import dumps

    from rich.console import Console

    from moe_harness.harness.record import history, store, view
    from moe_harness.harness.record.compare import compare as compared

    for path in (json, html, picture):
        options.writable(path)
    files = [store.read(path) for path in runs]
    if len(files) == 1:
        new = store.newest(files[0])
        earlier = [line for line in files[0] if line is not new[(line["kind"], line["name"])]]
        if not earlier:
            raise UsageError(f"{runs[0]} holds each result once; wanted are two files, or one with several runs")
        old = store.newest(earlier)
        new = {key: line for key, line in new.items() if key in old}
    else:
        old, new = (store.newest(found) for found in files[-2:])
    found = compared(old, new)
    view.show(found, Console())
    if json is not None:
        json.write_text(dumps(found.as_dict(), indent=1) + "\n", "utf-8")
    if html is not None:
        view.write_html(found, old, new, html)
    if picture is not None:
        history.draw([line for lines in files for line in lines], picture)
    raise typer.Exit(EXIT_FAIL if found.regressed else EXIT_CANNOT_JUDGE if found.refused else EXIT_PASS)
