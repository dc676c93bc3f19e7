"""The picture in docs/architecture.md, drawn from the imports of the code.

python -m moe_harness.suites.docs.architecture      rewrites the page's two blocks

The way of a value is a list of modules; an arrow joins two of which one imports the other.  A step that no import joins
to one before it is an error here, so that the picture cannot go on telling of a way that is gone.
"""

import ast

from moe_harness.suites.imports import FILES, KNOWS, ROOT, TREES

PAGE = ROOT / "docs" / "architecture.md"
HARNESS = "moe_harness.harness."
WAY = (  # module, what a value is there
    ("commands.check", "the command line: a stage, a spec, options"),
    ("run.session", "every case judged, failures explained"),
    ("core.plan", "the plan: a check and a case each"),
    ("process.pool", "processes that judge, watched"),
    ("process.worker", "one process: an implementation, case after case"),
    ("core.contracts", "the signature, what is declared"),
    ("core.registry", "the implementation that a spec names"),
    ("run.data_power", "data that reject standard wrong outputs"),
    ("core.stage", "the stage, found by its folder"),
    ("core.call", "tensors of the case"),
    ("core.memory", "laid out, fenced in, poisoned"),
    ("core.invocation", "called; the form of what comes back"),
    ("core.compare", "against the bound: |z| and rms"),
    ("core.bounds", "value and variance, the limits"),
    ("core.findings", "findings of one case"),
    ("diagnosis.search", "the known fault that explains it"),
    ("run.result_builder", "the result so far, the verdict"),
    ("diagnosis.clusters", "failures put together, their condition"),
    ("report.results", "the result as JSON"),
    ("report.terminal", "as text"),
    ("report.html", "as a page"),
)


def picture() -> str:
    """A Mermaid flowchart of the way."""
    modules = [HARNESS + name for name, _ in WAY]
    lines = ["```mermaid", "flowchart TD"]
    lines += [f'    {name.replace(".", "_")}["<b>{name.replace(".", "/")}</b><br>{told}"]' for name, told in WAY]
    for place, module in enumerate(modules):
        before = [other for other in modules[:place] if module in KNOWS[other] or other in KNOWS[module]]
        if place and not before:
            raise ValueError(f"{module} is imported by no step before it and imports none: is it on the way still?")
        for other in before[-2:]:
            lines.append(f"    {_node(other)} --> {_node(module)}")
    return "\n".join([*lines, "```"])


def rooms() -> str:
    """A table of the harness' folders: what each says of itself, how much it holds, whom it knows."""
    lines = ["| room | holds | modules | lines | imports from |", "|---|---|---|---|---|"]
    names = sorted({module.split(".")[2] for module in FILES if _is_harness(module) and module.count(".") > 2})
    for room in names:
        inside = [module for module in FILES if module.startswith(f"{HARNESS}{room}.") or module == HARNESS + room]
        known = {m.split(".")[2] for i in inside for m in KNOWS[i] if _is_harness(m)} & set(names) - {room}
        size = sum(len(FILES[module].read_text().splitlines()) for module in inside)
        told = ast.get_docstring(TREES[HARNESS + room]) or ""
        lines.append(f"| `{room}/` | {told.splitlines()[0]} | {len(inside)} | {size} | {', '.join(sorted(known))} |")
    return "\n".join(lines)


def _is_harness(module: str) -> bool:
    return module.startswith(HARNESS)


def _node(module: str) -> str:
    return module.removeprefix(HARNESS).replace(".", "_")


BLOCKS = {"way": picture, "rooms": rooms}


def rewritten(text: str) -> str:
    """The page with both blocks drawn anew."""
    for name, draw in BLOCKS.items():
        head, _, rest = text.partition(f"<!-- {name} -->\n")
        text = f"{head}<!-- {name} -->\n{draw()}\n<!-- end -->{rest.partition('<!-- end -->')[2]}"
    return text


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text()))
