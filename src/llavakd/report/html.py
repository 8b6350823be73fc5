"""The results as one self-contained HTML page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from html import escape
from importlib.resources import files

import numpy as np

from llavakd.report import plots, tables
from llavakd.report.compare import headline
from llavakd.report.results import TEACHER, Prediction, Results, Row

TITLE = "LLaVA-KD report"
CASES = 12


def page(results: Results) -> str:
    """Return the whole report as HTML that needs no other file and makes no request."""
    style = files("llavakd.report").joinpath("report.css").read_text(encoding="utf-8")
    sections = (
        _section("Results", _table(tables.console_rows(results)) + _note(tables.INTERVAL_NOTE)),
        _section("Accuracy by kind of question", _kinds(results)),
        _section("Loss curves", _losses(results)),
        _section("Test pictures", _cases(results)),
        _section("Gram matrices of the visual tokens", _grams(results)),
        _section("Cost", _cost(results)),
        _section("Recipe", _recipes(results)),
        _section("Environment", _environment(results)),
        _section("Left out", _list(results.notes)) if results.notes else "",
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{TITLE}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n<h1>{TITLE}</h1>\n"
        f'<p class="headline">{escape(headline(results)).replace(" %", "&nbsp;%")}</p>\n'
        f"{''.join(sections)}</main>\n</body>\n</html>\n"
    )


def pick_cases(results: Results, limit: int = CASES) -> list[str]:
    """Choose test questions to show, by id.

    Questions that some models get right and others wrong come first; within both groups the kinds of
    question take turns, each in the order of the test set.

    Args:
        results: The merged results.
        limit: How many to choose at most.

    Returns:
        Question ids, fewer than `limit` if fewer were answered by every model that kept its answers.
    """
    answered = _answered(results)
    if not answered:
        return []
    turns: Counter[tuple[bool, str]] = Counter()
    ranked: list[tuple[bool, int, int, str]] = []
    for place, (key, first) in enumerate(answered[0].predictions.items()):
        if not all(key in row.predictions for row in answered):
            continue
        agree = len({row.predictions[key].correct for row in answered}) == 1
        turns[agree, first.type] += 1
        ranked.append((agree, turns[agree, first.type], place, key))
    return [key for *_, key in sorted(ranked)[:limit]]


def _answered(results: Results) -> list[Row]:
    return [row for row in results.rows if row.predictions]


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}</section>\n"


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>\n'


def _list(lines: Iterable[str]) -> str:
    return '<ul class="note">' + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>\n"


def _table(table: tables.Table) -> str:
    header, rows = table
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>\n"
        for row in rows
    )
    return f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table></div>\n'


def _legend(labels: Iterable[tuple[str, str]], extra: str = "") -> str:
    items = "".join(f'<li><i style="background:{paint}"></i>{escape(label)}</li>' for paint, label in labels)
    return f'<ul class="legend">{items}{extra}</ul>\n'


def _kinds(results: Results) -> str:
    bars = plots.kind_bars(results)
    if bars is None:
        return _note("No run recorded accuracy by kind of question.")
    extra = '<li><i class="tick"></i>majority answer</li>' if tables.first_map(results, "majority_by_type") else ""
    extra += "<li>thin line: 95 % interval</li>" if tables.first_map(results, "n_by_type") else ""
    legend = _legend(((plots.colour(index), results.label(row)) for index, row in enumerate(results.rows)), extra)
    return f'{legend}<figure class="bars">{bars}</figure>\n{_table(tables.kind_rows(results))}'


def _losses(results: Results) -> str:
    panels = plots.loss_curves(results)
    if not panels:
        return _note("No run kept its training metrics.")
    drawn = "".join(f"<figure><figcaption>{escape(part)}</figcaption>{svg}</figure>\n" for part, svg in panels.items())
    note = _note(
        f"Long stages are drawn as the means of {plots.MAX_POINTS} equal stretches. A part without a line was off."
    )
    legend = _legend((plots.run_colour(results, run), run.label) for run in results.runs)
    return f'{legend}<div class="grid panels">\n{drawn}</div>\n{note}'


def _picture(path: str) -> str:
    uri = plots.picture_uri(path)
    return '<p class="note">picture not found</p>' if uri is None else f'<img src="{uri}" alt="test picture">'


def _cases(results: Results) -> str:
    chosen, answered = pick_cases(results), _answered(results)
    if not chosen:
        return _note("No question was answered by all models, or no run kept its answers.")
    note = _note("Questions that split the models come first, the kinds of question taking turns: no fair sample.")
    cards = []
    for key in chosen:
        case = answered[0].predictions[key]
        answers = "".join(_answer(results.label(row), row.predictions[key]) for row in answered)
        pictures = "".join(map(_picture, case.images))
        cards.append(
            f'<article>\n<div class="pictures">{pictures}</div>\n<p class="kind">{escape(case.type)}</p>\n'
            f'<p class="question">{escape(case.question)}</p>\n'
            f'<p class="truth">Truth: <b>{escape(case.truth)}</b></p>\n'
            f'<ul class="answers">{answers}</ul>\n</article>\n'
        )
    return f'{note}<div class="grid cases">\n{"".join(cards)}</div>\n'


def _answer(label: str, answer: Prediction) -> str:
    state, mark = ("right", "✓") if answer.correct else ("wrong", "✗")
    return (
        f'<li class="{state}"><span class="mark" title="{state}">{mark}</span> '
        f"<span>{escape(label)}</span> <b>{escape(answer.prediction) or '(empty)'}</b></li>"
    )


def _grams(results: Results) -> str:
    rows = [(row, row.gram) for row in results.rows if row.gram is not None]
    if not rows:
        return _note("No run kept Gram matrices of a probe picture.")
    teacher = next((gram for row, gram in rows if row.name == TEACHER), None)
    uris, (low, high), scale = plots.gram_pictures([gram for _, gram in rows])
    drawn = "".join(
        f"<figure><figcaption>probe picture</figcaption>{_picture(path)}</figure>\n" for path in results.probe
    )
    for (row, gram), uri in zip(rows, uris, strict=True):
        below = ""
        if teacher is not None and row.name != TEACHER and gram.shape == teacher.shape:
            cosine = float(np.vdot(gram, teacher) / (np.linalg.norm(gram) * np.linalg.norm(teacher)))
            below = _note(f"cosine to teacher {cosine:.3f}")
        image = f'<img src="{uri}" alt="Gram matrix of {escape(row.name)}">'
        drawn += f"<figure><figcaption>{escape(results.label(row))}</figcaption>{image}{below}</figure>\n"
    legend = f'<p class="scale">{low:.2g} <img src="{scale}" alt="colour scale"> {high:.2g}</p>\n'
    note = _note("Each matrix is divided by its Frobenius norm; all share one colour scale.")
    return f'<div class="grid grams">\n{drawn}</div>\n{legend}{note}'


def _cost(results: Results) -> str:
    stages = tables.stage_rows(results)
    return _table(tables.cost_rows(results)) + (_table(stages) if stages[1] else "")


def _recipes(results: Results) -> str:
    found = [
        f"<details><summary>{escape(run.label)}</summary><pre>{escape(run.recipe)}</pre></details>\n"
        for run in results.runs
        if run.recipe is not None
    ]
    return "".join(found) or _note("No run folder has a recipe.yaml.")


def _environment(results: Results) -> str:
    if not results.environment:
        return _note("No run recorded its environment.")
    rows = [
        [key, ", ".join(map(str, value)) if isinstance(value, list) else str(value)]
        for key, value in results.environment.items()
    ]
    return _table((["what", "value"], rows)).replace('class="scroll"', 'class="scroll plain"')
