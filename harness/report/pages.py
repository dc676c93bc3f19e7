"""Pages from templates: everything that is filled in is escaped, and what is left open is an error."""

from pathlib import Path
from typing import Any


def rendered(template: Path, values: dict[str, Any], *, trimmed: bool = False, **filters: Any) -> str:
    """The text of a page; `trimmed` leaves no lines where its statements stand."""
    # Imported here: jinja2 costs a tenth of a second, and most runs write no page.
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(template.parent), autoescape=True, undefined=StrictUndefined, trim_blocks=trimmed,
        lstrip_blocks=trimmed,
    )  # fmt: skip
    environment.filters.update(filters)
    return environment.get_template(template.name).render(values)
