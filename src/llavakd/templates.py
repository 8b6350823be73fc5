"""Wording and layout of the report, the terminal and the model card: jinja files in three folders."""

from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, select_autoescape

_ENVIRONMENT = Environment(  # one for all, for it keeps what it has compiled
    loader=ChoiceLoader([PackageLoader("llavakd", folder) for folder in ("report", "terminal", "assets")]),
    autoescape=select_autoescape(["html.jinja", "svg.jinja"]),
    extensions=["jinja2.ext.do"],
    undefined=StrictUndefined,
    trim_blocks=True,
)


def render(template: str, **content: Any) -> str:
    """Fill a template; what goes into HTML and SVG is escaped."""
    return _ENVIRONMENT.get_template(template).render(content)
