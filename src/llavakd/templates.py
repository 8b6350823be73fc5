"""Wording and layout of the report, the terminal and the model card: jinja files in three folders."""

from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, select_autoescape


def render(template: str, **content: Any) -> str:
    """Fill a template; what goes into HTML and SVG is escaped."""
    environment = Environment(
        loader=ChoiceLoader([PackageLoader("llavakd", folder) for folder in ("report", "terminal", "assets")]),
        autoescape=select_autoescape(["html.jinja", "svg.jinja"]),
        extensions=["jinja2.ext.do"],
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    return environment.get_template(template).render(content)
