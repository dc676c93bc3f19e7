"""A result for people: in the terminal, and as a page of its own."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

WIDTH = 140
STYLES = {"pass": "bold green", "fail": "bold red", "inconclusive": "bold yellow"}


def summary(result: dict[str, Any]) -> str:
    """The verdict in a sentence."""
    drop, (low, high), margin = result["drop"], result["interval"], result["margin"]
    measured = f"accuracy fell by {drop:.2%} [{low:.2%}, {high:.2%}]"
    fell = f"{measured}, significantly (p = {result['p']:.2g}), and a fall of {margin:.1%} is not excluded"
    if result["reasons"]:
        changed = f"the answers changed: {'; '.join(result['reasons'])}"
        return f"{fell}; {changed}" if result["p"] < 0.05 and high >= margin else changed
    if result["verdict"] == "pass":
        worse = "; a fall is significant, and smaller than the margin" if result["p"] < 0.05 else ""
        return f"{measured}, less than the margin of {margin:.1%}{worse}"
    if result["verdict"] == "fail":
        return fell
    right = result["accuracy"]["baseline"]
    if right <= margin:
        return (
            f"the baseline itself answers {right:.2%} right, so no fall of {margin:.1%} could show: ask something else"
        )
    needed = f"{result['needed']} questions would decide" if result["needed"] else "no feasible number would decide"
    return f"{measured}: neither worse nor within the margin of {margin:.1%}; at these rates {needed}"


def facts(result: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Rows of the table: what, baseline, candidate, difference."""
    rows = []
    for name, score in result["filters"].items():
        accuracy, (b, c) = score["accuracy"], score["discordant"]
        mark = " (judged)" if name == result["filter"] else ""
        rows.append((f"{name}{mark}", f"{accuracy['baseline']:.2%}", f"{accuracy['candidate']:.2%}",
                     f"{score['drop']:.2%} lost (only one right: {b}, {c}; p {score['p']:.2g})"))  # fmt: skip
    gold = result["gold_loglikelihood"]
    if gold is None:
        rows.append(("gold log-likelihood", "", "", "not measured"))
    elif gold["difference"] is None:
        rows.append(("gold log-likelihood", "", "", "not finite in any answer"))
    else:
        low, high = gold["interval"]
        spoiled = f"; not finite in {gold['not_finite']}" if gold["not_finite"] else ""
        rows.append(("gold log-likelihood, nats per answer", f"{gold['baseline']:.4g}",
                     f"{gold['baseline'] + gold['difference']:.4g}",
                     f"{gold['difference']:+.3g}  [{low:+.3g}, {high:+.3g}], p {gold['p']:.2g}{spoiled}"))  # fmt: skip
    flips = result["flips"]
    rows.append(("answers that differ", "", "", f"{flips['answers']} of {result['documents']}"))
    if "tokens" in flips:
        kl = "" if flips["kl"] is None else f", mean KL at least {flips['kl']:.2g} nats"
        rows.append(("greedy tokens that flip", "", "", f"{flips['tokens']} of {flips['of_tokens']}{kl}"))
    invalid, lengths = result["invalid"], result["lengths"]
    limit = lengths["at_limit"]
    rows.append(("invalid answers", f"{invalid['baseline']:.2%}", f"{invalid['candidate']:.2%}", ""))
    means = [lengths[side] for side in ("baseline", "candidate")]
    told = ("", "", "not told by a server") if None in means else (f"{means[0]:.1f}", f"{means[1]:.1f}", "")
    rows.append(("mean length, tokens", *told))
    rows.append(("cut off at the limit", f"{limit['baseline']:.2%}", f"{limit['candidate']:.2%}", ""))
    return rows


def show(result: dict[str, Any], console: "Console") -> None:
    """Print verdict and table."""
    from rich.table import Table
    from rich.text import Text

    title = f"{result['task']}: {result['documents']} questions, {result['candidate']} against {result['baseline']}"
    table = Table(title=Text(title), title_justify="left", box=None, pad_edge=False)
    for name in ("", "baseline", "candidate", "difference"):
        table.add_column(name, justify="right" if name in ("baseline", "candidate") else "left")
    for row in facts(result):
        table.add_row(*(Text(cell) for cell in row))
    if not console.is_terminal:  # a log has no width of its own, and 80 columns break every row in two
        console.width = max(console.width, WIDTH)
    console.print(table)
    for note in result["notes"]:
        console.print(Text(note, style="yellow"), soft_wrap=True)
    verdict = Text(result["verdict"].upper(), style=STYLES[result["verdict"]])
    console.print(verdict.append(f"  {summary(result)}", style="not bold default"), soft_wrap=True)


def write_html(result: dict[str, Any], path: Path) -> None:
    """A page of its own, with the questions on which the two differ."""
    from moe_harness.harness.report.pages import rendered

    # Lost answers first, then won ones: the page shows no more than the first hundred.
    differing = sorted(
        (row for row in result["rows"] if row["texts"] is not None),
        key=lambda row: (row["baseline"]["right"] == row["candidate"]["right"], row["candidate"]["right"]),
    )
    shown = {"result": result, "facts": facts(result), "summary": summary(result), "differing": differing}
    path.write_text(rendered(Path(__file__).with_name("page.html.j2"), shown), "utf-8")
