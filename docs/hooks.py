"""What mkdocs.yml adds to a build: formulas without a script, and links that leave docs/."""

from __future__ import annotations

import html
import re
from pathlib import PurePosixPath
from typing import Any

from latex2mathml.converter import convert

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
# A named function stands apart from its argument, unless that is in brackets.
_FUNCTION = re.compile(r'(<mi>(?:log|cos|exp|max|min|sign)</mi>)(?!<mo stretchy="false">&#x00028;|</)')
_LINK_OUT = re.compile(r"(?<!!)\[([^\]]*)\]\(\.\./([^)#\s]+)\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Files of the repository are linked where `repo_url` says where it is, and named where it does not."""
    place = config.repo_url and f"{config.repo_url.rstrip('/')}/{config.edit_uri or 'blob/main/'}"

    def link(found: re.Match[str]) -> str:
        text, path = found.groups()
        return f"[{text}]({place}{PurePosixPath(path)})" if place else text

    return _LINK_OUT.sub(link, markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Formulas as MathML, which browsers draw themselves."""

    def draw(found: re.Match[str]) -> str:
        kind, formula = found.groups()
        drawn = convert(html.unescape(formula).strip(), display="block" if kind == "div" else "inline")
        drawn = _FUNCTION.sub(r'\1<mspace width="0.17em" />', drawn)
        return f'<div class="formula">{drawn}</div>' if kind == "div" else drawn

    return _FORMULA.sub(draw, content)
