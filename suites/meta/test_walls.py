"""The walls of the house, read from the imports of every module: who may know whom, and that nobody goes in circles."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_harness.harness.core import folders

ROOT = Path(__file__).resolve().parents[2]
FILES = {
    ".".join(("moe_harness", *file.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): file
    for folder in ("harness", "impls", "reference", "suites")
    for file in (ROOT / folder).rglob("*.py")
}
FINDER = "moe_harness.harness.core.registry"  # the one module that names the package of implementations
# Folders whose tests are of an implementation's own inside, or time several: they import it.  All others name a spec.
OF_IMPLEMENTATIONS = {"triton", "model", "performance", "accuracy"}
ALLOWED = {"suites/dispatcher/interpreted.py"}  # puts an implementation's kernels under the interpreter, in the ranks


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


@pytest.mark.parametrize(
    ("folder", "never"),
    [("reference", {"harness", "impls", "suites"}), ("impls", {"harness", "reference", "suites"}),
     ("harness", {"impls", "suites"})],
)  # fmt: skip
def test_no_wall_is_broken(folder: str, never: set[str]) -> None:
    broken = [(n, m) for n in FILES if reached(n) == folder for m in KNOWS[n] if reached(m) in never]
    assert broken == []


def test_the_reference_imports_torch_alone() -> None:
    standard = {"collections", "dataclasses", "enum", "functools", "itertools", "math", "typing", "pathlib", "json"}
    seen = {reached(m) for n in FILES if reached(n) == "reference" for m in KNOWS[n]}
    assert seen - standard <= {"torch", "reference", "safetensors"}


def test_the_harness_names_no_implementation_in_a_string_either() -> None:
    for name, tree in TREES.items():
        if reached(name) != "harness" or name == FINDER:
            continue
        documented = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        texts = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
        told = [n for n in ast.walk(tree) if isinstance(n, ast.Constant) and id(n) in documented]
        spoken = [text for text in texts if text not in [t.value for t in told]]
        assert not [text for text in spoken if "impls." in text], name


def test_suites_name_implementations_by_spec() -> None:
    for name in FILES:
        path = FILES[name].relative_to(ROOT)
        if reached(name) == "suites" and path.parts[1] not in OF_IMPLEMENTATIONS and str(path) not in ALLOWED:
            assert not {m for m in KNOWS[name] if reached(m) == "impls"}, name


def test_nobody_goes_in_circles() -> None:
    direct = {name: {m for m in imports(tree.body, False) if m in FILES} - {name} for name, tree in TREES.items()}
    left = dict(direct)
    while free := [name for name, known in left.items() if not known & left.keys()]:
        left = {name: known for name, known in left.items() if name not in free}
    assert not left, f"these import each other in a circle, or a circle: {sorted(left)}"


def test_a_stage_knows_the_parts_that_every_stage_shares_and_no_run_of_them() -> None:
    """core and stages stand below checks, diagnosis' search, runs, proofs and commands."""
    upper = {"run", "process", "checks", "proof", "commands", "report", "ranks"}
    lower = [name for name in FILES if name.startswith(("moe_harness.harness.core.", f"{folders.PACKAGE}."))]
    direct = {name: set(imports(TREES[name].body, False)) for name in lower}
    climbs = [(n, m) for n, known in direct.items() for m in known if m.split(".")[2:3] and m.split(".")[2] in upper
              and m.startswith("moe_harness.harness.")]  # fmt: skip
    assert climbs == []
