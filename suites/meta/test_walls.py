"""The walls of the house, read from the imports of every module: who may know whom, and that nobody goes in circles."""

import ast

import pytest

from moe_harness.harness.core import registry
from moe_harness.suites.imports import FILES, KNOWS, ROOT, TREES, imports, reached

FINDER = "moe_harness.harness.core.registry"  # the one module that names the package of implementations
# Folders whose tests are of an implementation's own inside, or time several: they import it.  All others name a spec.
OF_IMPLEMENTATIONS = {"triton", "model", "performance", "accuracy"}
# lm-eval's words, which the gate exchanges with whoever answers; the judge's request and answer are others.
LM_EVAL = {"Request", "Answer"}
LONGEST = 400  # lines from which on a file is to be two
# These put an implementation's kernels under the interpreter, in the ranks.
ALLOWED = {"suites/dispatcher/interpreted.py", "suites/reduction/interpreted.py"}


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


@pytest.mark.parametrize("module", ["dispatchers.dispatcher", "parallel.parallel_linear", "parallel.reduction"])
def test_what_runs_over_ranks_of_a_cpu_imports_no_triton(module: str) -> None:
    """One of them starts kernels, and all are imported with it: none was found where Triton is not installed."""
    todo, seen = [f"moe_harness.impls.{module}"], set()
    while todo:
        seen.add(name := todo.pop())
        todo += [m for m in imports(TREES[name].body, False) if m in FILES and m not in seen]
        assert "triton" not in {reached(m) for m in imports(TREES[name].body, False)}, name


def test_nobody_goes_in_circles() -> None:
    direct = {name: {m for m in imports(tree.body, False) if m in FILES} - {name} for name, tree in TREES.items()}
    left = dict(direct)
    while free := [name for name, known in left.items() if not known & left.keys()]:
        left = {name: known for name, known in left.items() if name not in free}
    assert not left, f"these import each other in a circle, or a circle: {sorted(left)}"


def test_a_stage_knows_the_parts_that_every_stage_shares_and_no_run_of_them() -> None:
    """core and stages stand below checks, diagnosis' search, runs, proofs and commands."""
    upper = {"run", "process", "checks", "proof", "commands", "report", "ranks"}
    lower = [name for name in FILES if name.startswith(("moe_harness.harness.core.", f"{registry.PACKAGE}."))]
    direct = {name: set(imports(TREES[name].body, False)) for name in lower}
    climbs = [(n, m) for n, known in direct.items() for m in known if m.split(".")[2:3] and m.split(".")[2] in upper
              and m.startswith("moe_harness.harness.")]  # fmt: skip
    assert climbs == []


def test_core_knows_no_other_room_of_the_judge_even_within_functions() -> None:
    core = "moe_harness.harness.core."
    rooms = [(n, m) for n in FILES if n.startswith(core) for m in KNOWS[n] if m.startswith("moe_harness.harness.")]
    assert [(name, known) for name, known in rooms if not f"{known}.".startswith(core)] == []


def test_no_two_classes_of_the_judge_have_one_name() -> None:
    """A reader who meets a name knows which is meant; faults are named for what is wrong, templates are strangers'."""
    places: dict[str, list[str]] = {}
    for name, tree in TREES.items():
        if reached(name) == "harness" and ".faults." not in name and ".templates." not in name:
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef):
                    places.setdefault(node.name, []).append(name.removeprefix("moe_harness.harness."))
    twice = {name for name, found in places.items() if len(found) > 1}
    assert twice == LM_EVAL, {name: places[name] for name in twice - LM_EVAL}


def test_no_file_is_longer_than_a_reader_takes_in_at_once() -> None:
    long = {str(path.relative_to(ROOT)): n for path in FILES.values() if (n := path.read_text().count("\n")) >= LONGEST}
    assert not long, f"should hold fewer than {LONGEST} lines: {long}"
