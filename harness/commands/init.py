"""`moe-harness init STAGE`: a kernel file to start from; it runs, passes, and holds the contract in its docstring."""

from pathlib import Path
from typing import Annotated

import typer

from moe_harness.harness.commands import options
from moe_harness.harness.core.contracts import RANK_STAGES
from moe_harness.harness.core.errors import UsageError

TEMPLATES = Path(__file__).with_name("templates")
CLASSES = {"dispatcher": "Dispatcher", "parallel_linear": "ColumnParallel", "model": "load_model"}


def templates() -> list[tuple[str, str]]:
    """(stage, library) of each template."""
    names = (file.stem.rpartition("_") for file in sorted(TEMPLATES.glob("*.py")))
    return [(stage, library) for stage, _, library in names]


def stages() -> list[str]:
    """The stages that have a template."""
    return sorted({stage for stage, _ in templates()})


def init(
    stage: Annotated[str, typer.Argument(help="What to write.", autocompletion=options.starting_with(stages))],
    library: Annotated[
        str,
        typer.Option(
            "--library",
            "-l",
            help="torch or triton.",
            autocompletion=options.starting_with(lambda: ("torch", "triton")),
        ),
    ] = "torch",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The file; otherwise my_STAGE.py.")] = None,
) -> None:
    """Write a kernel file that passes, to be replaced piece by piece with a kernel of your own."""
    stage = options.one_of("stage", stage, stages())
    library = options.one_of(f"library for {stage}", library, [has for known, has in templates() if known == stage])
    path = out or Path(f"my_{stage}.py")
    options.writable(path)
    if path.exists():
        raise UsageError(f"{path} exists and is left as it is; --out names another file")
    path.write_text(text_of(stage, library, str(path)), encoding="utf-8")
    interpreted = "TRITON_INTERPRET=1 " if library == "triton" else ""
    ranks = " --ranks 1,2" if stage in RANK_STAGES else ""
    print(f"wrote {path}; judge it with")
    print(f"{interpreted}moe-harness check --stage {stage} --impl {path}:{CLASSES.get(stage, stage)}{ranks}")
    if interpreted:
        print("(on a machine with a GPU: --device cuda instead of TRITON_INTERPRET=1)")


def text_of(stage: str, library: str, path: str) -> str:
    """The template with the name of the file it becomes."""
    return (TEMPLATES / f"{stage}_{library}.py").read_text(encoding="utf-8").replace("FILE:", f"{path}:")
