"""Finished run folders as a table of results, as Markdown and as one self-contained HTML page."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from llavakd.report import compare, plots
from llavakd.report.compare import console_rows
from llavakd.report.results import Results, collect
from llavakd.templates import render

__all__ = ["collect", "console_rows", "markdown", "page", "pick_cases", "write_report"]


def write_report(runs: Sequence[Path], out: Path) -> Results:
    """Merge finished runs and write `results.json`, `report.md` and `report.html` to `out`, which may be one of them.

    Raises UserError, with nothing written, where a run folder is unusable or two of them disagree.
    """
    results = collect(runs)
    merged = {"rows": [row.raw for row in results.rows], "environment": results.environment}
    table = json.dumps(merged, indent=2, ensure_ascii=False) + "\n"
    texts = {"results.json": table, "report.md": markdown(results), "report.html": page(results)}
    out.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        draft = out / f".report-{name}"
        draft.write_text(text, encoding="utf-8")
        draft.replace(out / name)
    return results


def markdown(results: Results) -> str:
    """Return the headline, the tables and what is left out, for a pull request."""
    return render("report.md.jinja", results=results, compare=compare)


def page(results: Results) -> str:
    """Return the whole report as HTML that needs no other file and makes no request."""
    return render("report.html.jinja", results=results, compare=compare, plots=plots, cases=pick_cases(results))


def pick_cases(results: Results, limit: int = 12) -> list[str]:
    """Choose at most `limit` test questions, by id, that every model with kept answers has answered.

    Those that the fewest seeds of the main model (of all models where none is distilled) answer right come first,
    among them those that split the models; within each group the kinds of question take turns.
    """
    answered = [row for row in results.rows if row.predictions]
    judged = [row for row in compare.main_model(results) if row.predictions] or answered
    turns: Counter[tuple[int, bool, str]] = Counter()
    ranked: list[tuple[int, bool, int, int, str]] = []
    for place, (key, answer) in enumerate(answered[0].predictions.items() if answered else ()):
        if all(key in row.predictions for row in answered):
            right = sum(row.predictions[key]["correct"] for row in judged)
            agree = len({row.predictions[key]["correct"] for row in answered}) == 1
            group = right, agree, str(answer.get("type") or "")
            turns[group] += 1
            ranked.append((right, agree, turns[group], place, key))
    return [key for *_, key in sorted(ranked)[:limit]]
