"""Finished run folders as a table of results, as Markdown and as one self-contained HTML page."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llavakd.report import compare, plots
from llavakd.report.results import Results, collect
from llavakd.templates import render


def write_report(runs: Sequence[Path], out: Path) -> dict[str, Any]:
    """Merge finished runs, write `results.json`, `report.md` and `report.html` to `out`; returns what results.json holds.

    `out` may be one of the runs. Raises UserError, with nothing written, where one is unusable or two of them disagree.
    """
    results = collect(runs)
    merged = {"rows": [row.raw for row in results.rows], "environment": results.environment}
    written = {"results.json": json.dumps(merged, indent=2, ensure_ascii=False) + "\n", **texts(results)}
    out.mkdir(parents=True, exist_ok=True)
    for name, text in written.items():
        draft = out / f".report-{name}"
        draft.write_text(text, encoding="utf-8")
        draft.replace(out / name)
    return merged


def texts(results: Results) -> dict[str, str]:
    """What is to be read: Markdown for a pull request, and HTML that needs no other file and makes no request."""
    known = {"results": results, "compare": compare, "plots": plots, "cases": pick_cases(results)}
    known |= {part: render(f"{part}.jinja", **known).strip().splitlines() for part in ("headline", "notes")}
    return {name: render(f"{name}.jinja", **known) for name in ("report.md", "report.html")}


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
