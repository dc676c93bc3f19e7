"""Who imports whom, read from the text of every module of this project."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILES = {
    ".".join(("moe_harness", *file.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): file
    for folder in ("harness", "impls", "reference", "suites")
    for file in (ROOT / folder).rglob("*.py")
}


def imports(body: list[ast.stmt], inner: bool) -> Iterator[str]:
    """Modules of this project that are imported; `inner`: in functions too, which no circle goes through."""
    for node in body:
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in FILES else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif inner or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and not inner:
                continue
            for field in ("body", "orelse", "finalbody", "handlers"):
                yield from imports(getattr(node, field, []), inner)


TREES = {name: ast.parse(file.read_text()) for name, file in FILES.items()}
KNOWS = {name: set(imports(tree.body, True)) - {name} for name, tree in TREES.items()}


def reached(name: str) -> str:
    """The folder of a module of this project, else the package."""
    parts = name.split(".")
    return parts[1] if parts[0] == "moe_harness" and len(parts) > 1 else parts[0]
