"""The results as Markdown and as one self-contained HTML page, laid out by the two templates beside this file."""

from collections import Counter
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from llavakd.report import plots, tables
from llavakd.report.compare import headline
from llavakd.report.results import TEACHER, Results


def markdown(results: Results) -> str:
    """Return the headline, the main table, accuracy by kind of question and what is left out."""
    return _render("report.md.jinja", results)


def page(results: Results) -> str:
    """Return the whole report as HTML that needs no other file and makes no request."""
    return _render("report.html.jinja", results, plots=plots, cases=pick_cases(results), grams=_grams(results))


def _render(template: str, results: Results, **content: Any) -> str:
    environment = Environment(
        loader=PackageLoader("llavakd", "report"),
        autoescape=select_autoescape(["html.jinja"]),
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    content |= {"title": "LLaVA-KD report", "results": results, "headline": headline(results), "tables": tables}
    return environment.get_template(template).render(content)


def pick_cases(results: Results, limit: int = 12) -> list[str]:
    """Choose at most `limit` test questions, by id, that every model with kept answers has answered.

    Questions that some models get right and others wrong come first; within both groups the kinds of
    question take turns, each in the order of the test set.
    """
    answers = [row.predictions for row in results.rows if row.predictions]
    turns: Counter[tuple[bool, str]] = Counter()
    ranked: list[tuple[bool, int, int, str]] = []
    for place, key in enumerate(answers[0] if answers else ()):
        if all(key in kept for kept in answers):
            agree = len({kept[key]["correct"] for kept in answers}) == 1
            kind = answers[0][key].get("type") or ""
            turns[agree, kind] += 1
            ranked.append((agree, turns[agree, kind], place, key))
    return [key for *_, key in sorted(ranked)[:limit]]


def _grams(results: Results) -> dict[str, Any]:
    """Row, picture and cosine to the teacher of each Gram matrix, and the one colour scale; empty if there is none."""
    found = [(row, row.gram) for row in results.rows if row.gram is not None]
    if not found:
        return {}
    teacher = next((gram for row, gram in found if row.name == TEACHER), None)
    uris, ends, scale = plots.gram_pictures([gram for _, gram in found])
    shown = []
    for (row, gram), uri in zip(found, uris, strict=True):
        cosine = None
        if teacher is not None and row.name != TEACHER and gram.shape == teacher.shape:
            cosine = float(np.vdot(gram, teacher) / (np.linalg.norm(gram) * np.linalg.norm(teacher)))
        shown.append((row, uri, cosine))
    return {"shown": shown, "ends": ends, "scale": scale}
