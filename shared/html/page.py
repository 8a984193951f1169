"""Self-contained HTML pages from templates that share one style sheet."""

from dataclasses import dataclass
from pathlib import Path

from shared.html.plots import SERIES

TEMPLATES = Path(__file__).parent
STYLE = TEMPLATES / "page.css.jinja"


@dataclass(frozen=True)
class Bar:
    """A bar of a bar chart; `percent` of the track is filled, `title` shows under the pointer."""

    number: int
    name: str
    text: str
    percent: float
    note: str = ""
    title: str = ""


def write_template(path: Path, template: str, **content: object) -> None:
    """Write a page; everything it shows is inside it.

    Args:
        path: The file to write.
        template: Name of a template beside this module.
        content: What the template shows; its text is escaped.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(TEMPLATES)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.get_template(template).render(series=SERIES, **content)
    path.write_text(page, encoding="utf-8", errors="backslashreplace")  # a file name may be no text
