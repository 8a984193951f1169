"""Self-contained HTML pages from templates that share one style sheet."""

from dataclasses import dataclass
from pathlib import Path

from shared.html.plots import SERIES

STYLE = Path(__file__).with_name("page.css.jinja")


@dataclass(frozen=True)
class Bar:
    """A bar of a bar chart; `percent` of the track is filled, `title` shows under the pointer."""

    number: int
    name: str
    text: str
    percent: float
    note: str = ""
    title: str = ""


def write_template(path: Path, template: Path, **content: object) -> None:
    """Write a page; everything it shows is inside it.

    Args:
        path: The file to write.
        template: The template's file; it may include the style sheet.
        content: What the template shows; its text is escaped.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader([template.parent, STYLE.parent])
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.get_template(template.name).render(series=SERIES, **content)
    path.write_text(page, encoding="utf-8", errors="backslashreplace")  # a file name may be no text
