from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "suites/performance/data"


def row(*cells: object) -> str:
    """One line of a table in Markdown."""
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def header(*cells: object) -> list[str]:
    """The first two lines of a table in Markdown."""
    return [row(*cells), "|" + "---|" * len(cells)]
