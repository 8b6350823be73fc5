"""The templates beside this file hold the wording and the layout of the report."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape


def render(template: str, **content: Any) -> str:
    """Fill a template; what goes into HTML and SVG is escaped."""
    environment = Environment(
        loader=PackageLoader("llavakd", "report"),
        autoescape=select_autoescape(["html.jinja", "svg.jinja"]),
        extensions=["jinja2.ext.do"],
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    return environment.get_template(template).render(content)
